"""What an engine is: prompts and image embeddings in, tokens and text out, many requests at once.

Serving and captioning speak to this protocol. It follows the shape of
vLLM's `AsyncLLM.generate`: an asynchronous stream for each request, ended early by closing it. `transformers.py` and
`vllm.py` implement it.

Shapes: V image tokens, H decoder hidden size.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from artemis_vlm.errors import ArtemisError, RunError, SampleError

EngineKind = Literal["auto", "transformers", "vllm"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which engine, and its bounds, which together fix its memory.

    kind: auto takes vLLM where it is installed and computes on a GPU, else Transformers
    slots: requests that run at once
    max_length: tokens of a request, prompt and answer together
    step_tokens: tokens in one step at most; what decoding leaves of it goes to prompts. None takes what suits the engine
    quantization: fp8 computes the decoder's linear layers in 8 bits (vLLM alone)
    gpu_memory: share of the card that vLLM takes for weights and cache, whatever else is on it
    """

    kind: EngineKind = "auto"
    slots: int = 8
    max_length: int = 1024
    step_tokens: int | None = None
    quantization: Literal["none", "fp8"] = "none"
    gpu_memory: float = 0.85

    def __post_init__(self) -> None:
        if self.kind not in get_args(EngineKind):
            raise RunError(f"the engine is {self.kind}; expected one of {', '.join(get_args(EngineKind))}")
        if self.slots < 1 or self.max_length < 2:
            raise RunError(f"an engine needs 1 slot of 2 tokens at least; got {self.slots} of {self.max_length}")
        if self.step_tokens is not None and self.step_tokens <= self.slots:
            raise RunError(
                f"step_tokens is {self.step_tokens}; it must be above the {self.slots} slots, or no prompt starts"
            )
        if self.quantization not in ("none", "fp8"):
            raise RunError(f"quantization is {self.quantization}; expected none or fp8")
        if not 0 < self.gpu_memory < 1:
            raise RunError(f"gpu_memory is {self.gpu_memory}; it must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request picks its tokens.

    max_tokens: new tokens at most, the end-of-turn token included
    temperature: 0 is greedy
    top_p: the smallest set of tokens with this much probability, after the temperature
    seed: the same seed draws the same tokens; None draws afresh
    stop: generation ends where one of these appears in the text, which ends before it
    skip_special_tokens: whether the text leaves out tokens such as `<tool_call>`; the ids always have them
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SampleError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature <= 100:
            raise SampleError(f"temperature is {self.temperature}; it must be between 0 and 100")
        if not 0 < self.top_p <= 1:
            raise SampleError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if "" in self.stop:
            raise SampleError("a stop string is empty; leave it out")


@dataclass(frozen=True, slots=True, eq=False)
class ImageEmbedding:
    """An image as the decoder takes it.

    key: names the image's content; equal keys may share cached work
    embeds: (V, H) in the encoder's dtype
    grid: height and width in patches
    """

    key: str
    embeds: torch.Tensor
    grid: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.embeds.numel() * self.embeds.element_size()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as a plain array: torch's own pickling of bfloat16 takes half as long again, and sees no shared memory."""
        data = self.embeds.detach().cpu().contiguous()
        dtype = str(data.dtype).removeprefix("torch.")
        return _image_embedding, (self.key, data.view(_BITS[data.element_size()]).numpy(), dtype, self.grid)


#: Integers as wide as a float, since numpy knows no bfloat16.
_BITS = {2: torch.int16, 4: torch.int32}


def _image_embedding(key: str, bits: np.ndarray[Any, Any], dtype: str, grid: tuple[int, int]) -> ImageEmbedding:
    # torch.tensor copies: the array may lie in Ray's object store, which is read-only and can go away
    return ImageEmbedding(key, torch.tensor(bits).view(getattr(torch, dtype)), grid)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt to continue.

    id: unique among the requests that run
    prompt_ids: token ids with image placeholders expanded, as `chat.encode_prompt` gives them
    images: in the order of their placeholders
    stream: whether anyone reads the answer as it grows; if not, the engine may give it in one delta, which costs it less
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    images: tuple[ImageEmbedding, ...] = ()
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Delta:
    """What a request gained since the last: tokens, the text they complete (may be empty), and at the end the reason."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; `token_ids` has the token that ended it, `text` does not."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Now: requests that run and wait, tokens of KV cache in use. Since the start: steps, tokens, seconds computing."""

    running: int
    waiting: int
    kv_tokens: int
    kv_capacity_tokens: int
    kv_capacity_bytes: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    busy_s: float


class DecoderEngine(Protocol):
    """Continues many prompts at once."""

    @property
    def max_length(self) -> int:
        """Tokens that a request may have, prompt and answer together."""

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """The answer as it grows; the last delta, and only it, has a finish reason.

        Starts with the first iteration. Closing the iterator, or cancelling the task that waits on it, cancels.

        Raises:
            SampleError: the request does not fit the engine or its placeholders do not fit its images.
            RunError: the engine is closed or broken.
        """

    def cancel(self, request_id: str) -> None:
        """Ends a request's stream with the reason "cancelled" and frees what it holds; nothing if it is not there."""

    def stats(self) -> EngineStats: ...

    def check(self) -> None:
        """Raises RunError when the engine can serve no more."""

    def close(self) -> None:
        """Cancels everything and frees the memory."""


def check_fits(request: Request, max_length: int, image_token_id: int, hidden_size: int) -> None:
    """Raises SampleError when a request is too long, or its placeholders or its decoder do not fit its images."""
    prompt, new = len(request.prompt_ids), request.sampling.max_tokens
    if not prompt:
        raise SampleError("the prompt is empty")
    if prompt + new > max_length:
        raise SampleError(f"the prompt has {prompt} tokens and max_tokens is {new}; together they may be {max_length}")
    placeholders = request.prompt_ids.count(image_token_id)
    features = sum(len(image.embeds) for image in request.images)
    if placeholders != features:
        raise SampleError(f"{placeholders} image placeholder tokens for {features} image features")
    for image in request.images:
        if image.embeds.shape[1] != hidden_size:
            raise SampleError(f"image features of width {image.embeds.shape[1]}; this decoder takes {hidden_size}")


def end_tokens(eos_token_id: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Where plain `generate` would stop: what the generation configuration says, else the tokenizer's end of sequence."""
    ends = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or [])


async def deltas(
    queue: asyncio.Queue[Delta | ArtemisError], begin: Callable[[], None], cancel: Callable[[], None]
) -> AsyncIterator[Delta]:
    """What an engine's `generate` gives: begins with the first iteration, ends with the request, cancels when left earlier.

    Args:
        queue: takes what the engine delivers, an error in place of the last delta.
    """
    begin()
    ended = False
    try:
        while not ended:
            delta = await queue.get()
            if isinstance(delta, ArtemisError):
                ended = True
                raise delta
            ended = delta.finish_reason is not None
            yield delta
    finally:
        if not ended:
            cancel()


def broken_off(request: Request) -> RunError:
    """What the caller is told of a request that the engine cancelled and nobody else."""
    return RunError(f"the engine broke off the request {request.id} before its answer was whole; ask again")


async def complete(engine: DecoderEngine, request: Request) -> Completion:
    """The whole answer to one request.

    Raises:
        ArtemisError: as `DecoderEngine.generate`; or the request was cancelled, so that its answer is not whole.
    """
    tokens: list[int] = []
    texts: list[str] = []
    reason: FinishReason = "cancelled"
    async for delta in engine.generate(replace(request, stream=False)):
        tokens += delta.token_ids
        texts.append(delta.text)
        reason = delta.finish_reason or reason
    if reason == "cancelled":
        raise broken_off(request)
    return Completion(tuple(tokens), "".join(texts), reason)
