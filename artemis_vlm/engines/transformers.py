"""The engine without a GPU: any Transformers decoder, batched at every decoding step.

A step is one forward pass over one packed row: the newest token of every running request, and behind them as much of
waiting prompts as the step's budget allows. So requests join and leave between steps, a long prompt never holds up the
others, and every weight is read once a step. Keys and values lie in slots, allocated once: a request holds one slot
until it ends.

Greedy tokens equal plain `generate`'s in float32. In a narrower dtype they may part where two logits nearly tie, since
sums run in another order.

Shape suffixes: S slots, L positions in a slot, T tokens of a step, B decoding requests, N heads, K key-value heads,
G = N / K, D head size, H hidden size.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase

from artemis_vlm import graft
from artemis_vlm.engines.base import (
    Delta,
    EngineConfig,
    EngineStats,
    FinishReason,
    Request,
    SamplingParams,
    check_fits,
    deltas,
    end_tokens,
)
from artemis_vlm.engines.text import AnswerText
from artemis_vlm.errors import ArtemisError, RunError
from artemis_vlm.modeling import splice

logger = logging.getLogger(__name__)

#: Name of `slot_attention` among Transformers' attention functions. It has no mask function of that name, which is how
#: a decoder is told to make no mask.
SLOT_ATTENTION: Final = "artemis_slots"
#: Tokens in one step unless the configuration says.
STEP_TOKENS: Final = 512
#: Most likely tokens looked at before the whole vocabulary is sorted for top_p.
TOP_P_FIRST: Final = 256
#: Below it the likeliest token is the only one; logits over a smaller one could be infinite.
MIN_TEMPERATURE: Final = 1e-5


class TransformersEngine:
    """`DecoderEngine` over a Transformers decoder, which it takes for itself. Steps run in a thread of their own."""

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        config: EngineConfig | None = None,
    ) -> None:
        self._batch = StepBatch(decoder, tokenizer, image_token_id, config or EngineConfig())
        self._tokenizer = tokenizer
        self._wake = threading.Condition()
        #: Answers that join, and ids of those that leave, in the order in which that was asked for.
        self._changes: list[Answer | str] = []
        self._closed = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="decoder-steps", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, folder: Path, config: EngineConfig | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> TransformersEngine:
        """From an A3 folder, reading only the decoder's tensors.

        Args:
            dtype: None takes that in which the decoder is stored.
        """
        tokenizer = graft.load_tokenizer(folder)
        return cls(graft.load_decoder(folder, dtype, device), tokenizer, graft.load_config(folder).image_token_id, config)

    @property
    def max_length(self) -> int:
        return self._batch.config.max_length

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        queue: asyncio.Queue[Delta | ArtemisError] = asyncio.Queue()

        def begin() -> None:
            self._batch.check_fits(request)
            loop = asyncio.get_running_loop()

            def deliver(delta: Delta | ArtemisError) -> None:
                if not loop.is_closed():  # its program ended with requests open; nobody waits for this
                    loop.call_soon_threadsafe(queue.put_nowait, delta)

            self._submit(Answer(request, AnswerText.of(self._tokenizer, request.sampling), deliver))

        return deltas(queue, begin, lambda: self.cancel(request.id))

    def _submit(self, answer: Answer) -> None:
        with self._wake:
            self.check()
            self._changes.append(answer)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        with self._wake:
            self._changes.append(request_id)
            self._wake.notify()

    def stats(self) -> EngineStats:
        return self._batch.stats()

    def check(self) -> None:
        if self._broken is not None:
            raise RunError(f"the engine broke and needs a restart: {self._broken!r}") from self._broken
        if self._closed:
            raise RunError("the engine is closed")

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_changes():
                self._batch.step()
        except BaseException as error:
            logger.exception("the engine broke")
            self._broken = error
        with self._wake:
            self._batch.change(self._changes)
            self._changes = []
            self._closed = True
        broken = None if self._broken is None else RunError(f"the engine broke while the request ran: {self._broken!r}")
        self._batch.abandon(broken)

    def _take_changes(self) -> bool:
        """Waits until there is something to do; whether to go on."""
        with self._wake:
            while not (self._closed or self._changes or self._batch.busy):
                self._wake.wait()
            if self._closed:
                return False
            changes, self._changes = self._changes, []
        self._batch.change(changes)
        return True


@dataclass(slots=True, eq=False)
class Answer:
    """A request on its way.

    slot: where its keys and values lie, -1 while it waits
    cached: tokens whose keys and values are there
    prompt: float (P, H), embeddings of the prompt, None before it starts and after it was read
    newest: the last token, not in the cache yet
    """

    request: Request
    text: AnswerText
    deliver: Callable[[Delta | ArtemisError], None]
    slot: int = -1
    cached: int = 0
    prompt: torch.Tensor | None = None
    newest: int = -1
    count: int = 0
    random: torch.Generator = field(default_factory=torch.Generator)

    @property
    def prompt_left(self) -> int:
        return len(self.request.prompt_ids) - self.cached


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Part of a prompt in a step: tokens first:end of the row, after `past` tokens already in the slot."""

    answer: Answer
    first: int
    end: int
    past: int


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step's row: B decoding tokens, then spans of prompts.

    slots, positions: int64 (T,), where each token's keys and values go
    decoding: the answers of the first B tokens; decoding_slots: int64 (B,)
    visible: bool (R, 1, 1, M), positions that each of the first R slots attends to when decoding
    """

    slots: torch.Tensor
    positions: torch.Tensor
    decoding: list[Answer]
    decoding_slots: torch.Tensor
    visible: torch.Tensor
    spans: list[Span]


class SlotCache:
    """Keys and values, (S, K, L, D) a layer, allocated once. Takes the place of Transformers' own cache."""

    def __init__(self, decoder: PreTrainedModel, config: EngineConfig) -> None:
        text = decoder.config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (config.slots, text.num_key_value_heads, config.max_length, head)
        options: Any = {"dtype": decoder.dtype, "device": decoder.device}
        # zeros: what was never written is masked, but must not be NaN
        self.layers = [(torch.zeros(shape, **options), torch.zeros(shape, **options)) for _ in range(text.num_hidden_layers)]
        self.nbytes = sum(k.nbytes + v.nbytes for k, v in self.layers)
        self.plan: StepPlan | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a step's keys and values (1, K, T, D); returns the layer's whole slots, which `slot_attention` reads."""
        assert self.plan is not None
        slots, positions = self.plan.slots, self.plan.positions
        stored_keys, stored_values = self.layers[layer]
        stored_keys[slots, :, positions] = keys[0].transpose(0, 1)
        stored_values[slots, :, positions] = values[0].transpose(0, 1)
        return stored_keys, stored_values


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    plan: StepPlan,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a step's tokens, each to its own slot up to itself.

    Equals `softmax(q k^T * scaling) v` over the slot's positions 0..p for a token at position p.

    Args:
        query: (1, N, T, D); keys, values: (S, K, L, D), the step's own already written.

    Returns:
        (1, T, N, D) and None.
    """
    if softcap is not None or s_aux is not None:
        raise RunError(f"{type(module).__name__} wants capped or sink attention, which this engine does not compute")
    out = torch.empty_like(query[0].transpose(0, 1))
    if plan.decoding:
        out[: len(plan.decoding)] = _decode_attention(query, keys, values, plan, scaling)
    for span in plan.spans:
        slot, length = span.answer.slot, span.past + span.end - span.first
        mask = None
        if span.past:
            mask = torch.ones(span.end - span.first, length, dtype=torch.bool, device=query.device).tril(span.past)
        part = F.scaled_dot_product_attention(
            query[:, :, span.first : span.end],
            keys[slot : slot + 1, :, :length],
            values[slot : slot + 1, :, :length],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        out[span.first : span.end] = part[0].transpose(0, 1)
    return out[None], None


def _decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: StepPlan, scaling: float | None
) -> torch.Tensor:
    """(B, N, D). One call for all slots up to the last in use, so that no key is copied; idle rows are thrown away.

    The G heads that share keys stand as G queries, so that no key is repeated either.
    """
    rows, width, kv_heads = plan.visible.shape[0], plan.visible.shape[3], keys.shape[1]
    heads, size = query.shape[1], query.shape[3]
    spread = query.new_zeros(rows, heads, size)
    spread[plan.decoding_slots] = query[0, :, : len(plan.decoding)].transpose(0, 1)
    out = F.scaled_dot_product_attention(
        spread.view(rows, kv_heads, heads // kv_heads, size),
        keys[:rows, :, :width],
        values[:rows, :, :width],
        attn_mask=plan.visible,
        scale=scaling,
    )
    return out.reshape(rows, heads, size)[plan.decoding_slots]


AttentionInterface.register(SLOT_ATTENTION, slot_attention)


class StepBatch:
    """The engine without its thread: answers join, step together, and leave. Not thread-safe, but for `stats`."""

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        config: EngineConfig,
    ) -> None:
        _check_decoder(decoder, config)
        decoder.config._attn_implementation = SLOT_ATTENTION
        self.decoder, self.config, self.image_token_id = decoder.eval(), config, image_token_id
        self.step_tokens = config.step_tokens or max(STEP_TOKENS, 2 * config.slots)
        self.ends = end_tokens(decoder.generation_config.eos_token_id, tokenizer)
        self.cache = SlotCache(decoder, config)
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.free = set(range(config.slots))
        self.steps = self.prompt_tokens = self.generated_tokens = 0
        self.busy_s = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def check_fits(self, request: Request) -> None:
        """Raises SampleError when a request does not fit."""
        check_fits(request, self.config.max_length, self.image_token_id, self.decoder.config.hidden_size)

    def change(self, changes: Sequence[Answer | str]) -> None:
        """Takes answers in, and cancels those with an id, in order."""
        for change in changes:
            if isinstance(change, Answer):
                self.waiting.append(change)
            else:
                for answer in [a for a in (*self.running, *self.waiting) if a.request.id == change]:
                    self._end(answer, Delta((), "", "cancelled"))

    def abandon(self, error: RunError | None) -> None:
        """Ends everything, with the error if there is one."""
        for answer in [*self.running, *self.waiting]:
            self._end(answer, error or Delta((), "", "cancelled"))

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_tokens=sum(a.cached for a in list(self.running)),
            kv_capacity_tokens=self.config.slots * self.config.max_length,
            kv_capacity_bytes=self.cache.nbytes,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            busy_s=self.busy_s,
        )

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every answer that decodes, and as much of the prompts as the budget allows."""
        self._admit()
        if not self.running:
            return
        started = time.perf_counter()
        plan = self._plan()
        self.cache.plan = plan
        ready = [span for span in plan.spans if span.end - span.first == span.answer.prompt_left]
        rows = [*range(len(plan.decoding)), *(span.end - 1 for span in ready)]
        logits = self.decoder(
            inputs_embeds=self._embeds(plan)[None],
            position_ids=plan.positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=torch.tensor(rows, dtype=torch.int64, device=self.decoder.device),
            plan=plan,
        ).logits[0]
        for span in plan.spans:
            span.answer.cached += span.end - span.first
            self.prompt_tokens += span.end - span.first
        for answer in plan.decoding:
            answer.cached += 1
        for span in ready:
            span.answer.prompt = None
        answers = [*plan.decoding, *(span.answer for span in ready)]
        self.steps += 1
        for answer, token in zip(answers, pick_tokens(logits, answers)):
            self._give(answer, token)
        self.busy_s += time.perf_counter() - started

    def _admit(self) -> None:
        while self.waiting and self.free:
            answer = self.waiting.popleft()
            # The lowest free slot keeps those in use together, at the front.
            answer.slot = min(self.free)
            self.free.remove(answer.slot)
            answer.prompt = self._prompt_embeds(answer.request)
            seed = answer.request.sampling.seed
            answer.random.seed() if seed is None else answer.random.manual_seed(seed % 2**63)
            self.running.append(answer)

    def _prompt_embeds(self, request: Request) -> torch.Tensor:
        ids = torch.tensor(request.prompt_ids, dtype=torch.int64, device=self.decoder.device)
        embeds: torch.Tensor = self.decoder.get_input_embeddings()(ids)[None]
        if request.images:
            features = torch.cat([image.embeds for image in request.images])
            embeds = splice(embeds, ids[None] == self.image_token_id, features)
        return embeds[0]

    def _plan(self) -> StepPlan:
        decoding = [a for a in self.running if a.prompt is None]
        slots, positions = [a.slot for a in decoding], [a.cached for a in decoding]
        spans: list[Span] = []
        for answer in self.running:
            room = min(self.step_tokens - len(slots), answer.prompt_left)
            if answer.prompt is None or room <= 0:
                continue
            spans.append(Span(answer, len(slots), len(slots) + room, answer.cached))
            slots += [answer.slot] * room
            positions += range(answer.cached, answer.cached + room)
        device = self.decoder.device
        ends = torch.ones(max(slots[: len(decoding)], default=0) + 1, dtype=torch.int64)  # idle rows see one position
        for answer in decoding:
            ends[answer.slot] = answer.cached + 1
        visible = torch.arange(int(ends.max())) < ends[:, None]
        return StepPlan(
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            decoding=decoding,
            decoding_slots=torch.tensor(slots[: len(decoding)], dtype=torch.int64, device=device),
            visible=visible[:, None, None].to(device),
            spans=spans,
        )

    def _embeds(self, plan: StepPlan) -> torch.Tensor:
        """(T, H)"""
        newest = torch.tensor([a.newest for a in plan.decoding], dtype=torch.int64, device=self.decoder.device)
        parts = [self.decoder.get_input_embeddings()(newest)]
        for span in plan.spans:
            assert span.answer.prompt is not None
            parts.append(span.answer.prompt[span.past : span.past + span.end - span.first])
        return torch.cat(parts)

    def _give(self, answer: Answer, token: int) -> None:
        """One more token to an answer, and its end where it ends."""
        answer.newest = token
        answer.count += 1
        self.generated_tokens += 1
        ended = token in self.ends
        shown = "" if ended else answer.text.push(token)
        reason: FinishReason | None = None
        if ended or answer.text.stopped:
            reason = "stop"
        elif answer.count == answer.request.sampling.max_tokens:
            reason = "length"
        if reason is None:
            answer.deliver(Delta((token,), shown))
        else:
            self._end(answer, Delta((token,), shown + answer.text.finish(), reason))

    def _end(self, answer: Answer, last: Delta | ArtemisError) -> None:
        if answer.slot < 0:
            self.waiting.remove(answer)
        else:
            self.running.remove(answer)
            self.free.add(answer.slot)
        answer.deliver(last)


def pick_tokens(logits: torch.Tensor, answers: list[Answer]) -> list[int]:
    """The next token of each answer from its row of logits (R, V)."""
    if not answers:
        return []
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, answer in enumerate(answers):
        if answer.request.sampling.temperature > 0:
            tokens[row] = draw(logits[row].float().cpu(), answer.request.sampling, answer.random)
    return tokens


def draw(logits: torch.Tensor, sampling: SamplingParams, random: torch.Generator) -> int:
    """One token of softmax(logits / temperature) restricted to top_p; logits float32 (V,).

    The token with the largest probability / exponential noise, which draws from that distribution. The noise belongs to
    a token, whatever its rank, so logits that differ in their last bits give the same token for the same seed.
    """
    probabilities = F.softmax((logits - logits.max()) / max(sampling.temperature, MIN_TEMPERATURE), -1)
    scores = probabilities / torch.empty_like(probabilities).exponential_(generator=random)
    if sampling.top_p == 1.0:
        return int(scores.argmax())
    values, tokens = probabilities.topk(min(TOP_P_FIRST, len(logits)))
    if values.sum() < sampling.top_p:
        values, tokens = probabilities.sort(descending=True, stable=True)
    kept = tokens[: max(1, int((values.cumsum(0) - values < sampling.top_p).sum()))]
    return int(kept[scores[kept].argmax()])


def _check_decoder(decoder: PreTrainedModel, config: EngineConfig) -> None:
    text = decoder.config
    limit = min(
        getattr(text, "max_position_embeddings", None) or config.max_length,
        getattr(text, "sliding_window", None) or config.max_length,
    )
    if config.max_length > limit:
        raise RunError(f"max_length is {config.max_length}; this decoder attends to {limit} tokens at most")
    if config.quantization != "none":
        raise RunError(f"quantization is {config.quantization}; the transformers engine has none, choose the vllm engine")
