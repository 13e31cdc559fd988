"""The engine on a GPU: vLLM's `AsyncLLM`, fed with token ids and image embeddings, never with pixels.

vLLM builds the decoder alone (`enable_mm_embeds`, no images); tower and projector run elsewhere, in an `ImageEncoder`.
It is asked for token ids; text and stop strings come of `AnswerText`, as in the other engine. An image's key is its
uuid there, so a prompt that begins with the same image finds its keys and values in the prefix cache.

`AsyncLLM` belongs to one event loop, so it gets one of its own, in a thread; callers may be on any.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
import vllm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from artemis_vlm import graft
from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.engines.base import (
    Delta,
    EngineConfig,
    EngineStats,
    FinishReason,
    Request,
    check_fits,
    deltas,
    end_tokens,
)
from artemis_vlm.engines.text import AnswerText
from artemis_vlm.errors import ArtemisError, RunError, SampleError
from artemis_vlm.vllm_plugin import announce

logger = logging.getLogger(__name__)

#: Tokens in one step unless the configuration says: prompts of about 30 images, which fill an H100.
STEP_TOKENS: Final = 8192


@dataclass(slots=True, eq=False)
class Answer:
    """A request on its way: where its deltas go, and what of it is text already."""

    request: Request
    text: AnswerText
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta | ArtemisError]
    ended: bool = False

    def take(self, tokens: Sequence[int], reason: str | None, ends: frozenset[int]) -> Delta:
        """The delta of vLLM's next tokens; with a reason if the answer ends in it."""
        shown = ""
        for count, token in enumerate(tokens, 1):
            ended = token in ends
            shown += "" if ended else self.text.push(token)
            if ended or self.text.stopped:
                return Delta(tuple(tokens[:count]), shown + self.text.finish(), "stop")
        if reason is None:
            return Delta(tuple(tokens), shown)
        finished: FinishReason = "length" if reason == "length" else "cancelled"
        return Delta(tuple(tokens), shown + self.text.finish(), finished)


class VllmEngine:
    """`DecoderEngine` over vLLM, whose own process computes."""

    def __init__(
        self, llm_args: AsyncEngineArgs, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], config: ArtemisVLMConfig
    ) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._image_token_id, self._hidden_size = config.image_token_id, config.text_config.hidden_size
        self._closed = False
        #: No request begins between the closing of the door and the end of those inside.
        self._door = threading.Lock()
        #: All three changed in the engine's thread alone.
        self._open = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._mail: WeakKeyDictionary[asyncio.AbstractEventLoop, deque[tuple[Answer, Delta | ArtemisError]]]
        self._mail = WeakKeyDictionary()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        self._thread.start()
        self._stats = Stats()
        try:
            self._llm: AsyncLLM = asyncio.run_coroutine_threadsafe(self._start(llm_args), self._loop).result()
        except BaseException:
            self._end_loop()
            raise
        self.max_length: int = self._llm.model_config.max_model_len
        cache = self._llm.vllm_config.cache_config
        self._capacity = (cache.num_gpu_blocks or 0) * cache.block_size
        self._capacity_bytes = self._capacity * token_bytes(self._llm)

    @classmethod
    def load(
        cls,
        folder: Path,
        config: EngineConfig | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cuda",
        **options: Any,
    ) -> VllmEngine:
        """From an A3 folder, reading only the decoder's tensors.

        Args:
            dtype: None takes that of the folder's configuration.
            device: cuda, or cpu with vLLM's CPU build; which card is for CUDA_VISIBLE_DEVICES to say.
            options: further arguments of vLLM's own `EngineArgs`.

        Raises:
            CheckpointError: the folder is not an A3.
            RunError: this vLLM computes on something else than the device.
        """
        config = config or EngineConfig()
        if (wanted := torch.device(device)).type != current_platform.device_type:
            raise RunError(
                f"the device is {wanted.type}, but this vLLM ({vllm.__version__}) computes on "
                f"{current_platform.device_type}; choose that device, or the transformers engine"
            )
        announce()
        # A fork would copy the threads that run by now, and their locks, into vLLM's process.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        model_config, tokenizer = graft.load_config(folder), graft.load_tokenizer(folder)
        eos = model_config.text_config.eos_token_id
        if (folder / "generation_config.json").exists():
            eos = GenerationConfig.from_pretrained(folder).eos_token_id
        arguments = {
            "model": str(folder),
            "dtype": "auto" if dtype is None else str(dtype).removeprefix("torch."),
            "max_num_seqs": config.slots,
            "max_model_len": config.max_length,
            "max_num_batched_tokens": config.step_tokens or STEP_TOKENS,
            "gpu_memory_utilization": config.gpu_memory,
            "quantization": None if config.quantization == "none" else config.quantization,
            "enable_mm_embeds": True,
            "limit_mm_per_prompt": {"image": 0},  # the tower is not built
            "mm_processor_cache_gb": 0,  # embeddings have their own cache, in the encoder
            "disable_log_stats": True,
        }
        return cls(AsyncEngineArgs(**arguments | options), tokenizer, end_tokens(eos, tokenizer), model_config)

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        queue: asyncio.Queue[Delta | ArtemisError] = asyncio.Queue()

        def begin() -> None:
            check_fits(request, self.max_length, self._image_token_id, self._hidden_size)
            answer = Answer(request, AnswerText.of(self._tokenizer, request.sampling), asyncio.get_running_loop(), queue)
            with self._door:
                self.check()
                self._loop.call_soon_threadsafe(self._begin, answer)

        return deltas(queue, begin, lambda: self.cancel(request.id))

    def cancel(self, request_id: str) -> None:
        with self._door:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._cancel, request_id)

    def stats(self) -> EngineStats:
        total, now = self._open, self._stats
        waiting = min(now.waiting, total)
        return EngineStats(
            running=total - waiting,
            waiting=waiting,
            kv_tokens=round(now.kv_usage * self._capacity) if total else 0,
            kv_capacity_tokens=self._capacity,
            kv_capacity_bytes=self._capacity_bytes,
            steps=now.steps,
            prompt_tokens=now.prompt_tokens,
            generated_tokens=now.generated_tokens,
            busy_s=now.busy_s,
        )

    def check(self) -> None:
        if self._closed:
            raise RunError("the engine is closed")
        if self._llm.errored:
            raise RunError(f"the engine broke and needs a restart: {self._llm.dead_error!r}") from self._llm.dead_error

    def close(self) -> None:
        with self._door:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._end_loop()
        del self._llm  # now, not at the end of the program, when what it cleans up with is gone

    # --- in the engine's thread ---

    async def _start(self, llm_args: AsyncEngineArgs) -> AsyncLLM:
        return AsyncLLM.from_engine_args(llm_args, stat_loggers=[lambda config, index: self._stats])

    async def _stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._llm.shutdown()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _begin(self, answer: Answer) -> None:
        self._open += 1
        task = self._loop.create_task(self._run(answer))
        self._tasks[answer.request.id] = task
        task.add_done_callback(lambda done: self._finish(answer, done))

    def _cancel(self, request_id: str) -> None:
        if task := self._tasks.get(request_id):
            task.cancel()

    async def _run(self, answer: Answer) -> None:
        """One request from its start to its last delta; leaving early ends it in vLLM too."""
        request = answer.request
        prompt, sampling = vllm_prompt(request, self._image_token_id), vllm_sampling(request, self._ends)
        async with aclosing(self._llm.generate(prompt, sampling, request.id)) as outputs:
            async for output in outputs:
                part = output.outputs[0]
                delta = answer.take(part.token_ids, part.finish_reason, self._ends)
                if delta.token_ids or delta.finish_reason:
                    self._deliver(answer, delta)
                if delta.finish_reason:
                    return
        raise EngineDeadError  # it always ends with a reason

    def _finish(self, answer: Answer, task: asyncio.Task[None]) -> None:
        """However a request ended, its caller hears of it."""
        if self._tasks.get(answer.request.id) is task:
            del self._tasks[answer.request.id]
        if task.cancelled():
            self._deliver(answer, Delta((), "", "cancelled"))
        elif error := task.exception():
            self._deliver(answer, _told(error))

    def _deliver(self, answer: Answer, delta: Delta | ArtemisError) -> None:
        """To the caller's loop, which is woken once for all that a step brings."""
        if answer.ended:
            return  # cancelled between its last delta and its end in vLLM
        if isinstance(delta, ArtemisError) or delta.finish_reason:
            answer.ended = True
            self._open -= 1
        mail = self._mail.setdefault(answer.loop, deque())
        mail.append((answer, delta))
        if len(mail) == 1 and not answer.loop.is_closed():
            answer.loop.call_soon_threadsafe(_hand_out, mail)


def _told(error: BaseException) -> ArtemisError:
    """What went wrong in a request, as the caller is told."""
    told: ArtemisError
    if isinstance(error, (VLLMValidationError, ValueError)):  # the one is the other up to 0.24
        told = SampleError(f"vLLM refuses the request: {error}")
    else:
        cause = error.__cause__ or error  # vLLM wraps what it did not expect
        told = RunError(f"the engine broke while the request ran: {cause!r}")
    told.__cause__ = error
    return told


def _hand_out(mail: deque[tuple[Answer, Delta | ArtemisError]]) -> None:
    while mail:
        answer, delta = mail.popleft()
        answer.queue.put_nowait(delta)


class Stats(StatLoggerBase):  # type: ignore[misc]
    """What vLLM tells after each step, summed."""

    def __init__(self) -> None:
        self.waiting = self.steps = self.prompt_tokens = self.generated_tokens = 0
        self.kv_usage = self.busy_s = 0.0
        self._last = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        if scheduler_stats is not None:
            self.waiting, self.kv_usage = scheduler_stats.num_waiting_reqs, scheduler_stats.kv_cache_usage
            self.steps += 1
            # between two steps with work in them it computed; a pause is none
            self.busy_s += min(now - self._last, 1.0) if self._last else 0.0
            self._last = now if scheduler_stats.num_running_reqs else 0.0
        if iteration_stats is not None:
            self.prompt_tokens += iteration_stats.num_prompt_tokens
            self.generated_tokens += iteration_stats.num_generation_tokens

    def log_engine_initialized(self) -> None:
        """vLLM's hook; nothing to log."""


def token_bytes(llm: AsyncLLM) -> int:
    """Of keys and values."""
    model, parallel = llm.model_config, llm.vllm_config.parallel_config
    per_layer = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.dtype.itemsize
    return int(per_layer * model.get_num_layers(parallel))


def vllm_prompt(request: Request, image_token_id: int) -> dict[str, Any]:
    """A request as vLLM takes it: one placeholder an image, which it expands again by the grid."""
    if not request.images:
        return {"prompt_token_ids": list(request.prompt_ids)}
    ids: list[int] = []
    lengths, skip = iter([len(image.embeds) for image in request.images]), 0
    for token in request.prompt_ids:
        if token != image_token_id:
            ids.append(token)
        elif skip:
            skip -= 1
        else:
            ids.append(token)
            skip = next(lengths) - 1
    parts = [image.embeds for image in request.images]
    embeds = parts[0] if len(parts) == 1 else torch.cat(parts)  # a copy of 2.6 MB would take as long as all else here
    grids = torch.tensor([(1, *image.grid) for image in request.images])
    return {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": {"image_embeds": embeds, "image_grid_thw": grids}},
        "multi_modal_uuids": {"image": [image.key for image in request.images]},
    }


def vllm_sampling(request: Request, ends: frozenset[int]) -> vllm.SamplingParams:
    sampling = request.sampling
    # whole answers spare the host 0.1 ms a token; stop strings must be looked for as the tokens come
    stream = request.stream or bool(sampling.stop)
    return vllm.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=None if sampling.seed is None else sampling.seed % 2**63,
        ignore_eos=True,  # ours are the stop tokens, all of them
        stop_token_ids=sorted(ends),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )
