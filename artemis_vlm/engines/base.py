"""What an engine is: prompts and image embeddings in, tokens and text out, many requests at once.

Serving and captioning speak to this protocol; `transformers.py` implements it without a GPU. It follows the shape of
vLLM's `AsyncLLM.generate`: an asynchronous stream for each request, ended early by closing it.

Shapes: V image tokens, H decoder hidden size.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from artemis_vlm.errors import SampleError

FinishReason = Literal["stop", "length", "cancelled"]


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
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    images: tuple[ImageEmbedding, ...] = ()


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


async def complete(engine: DecoderEngine, request: Request) -> Completion:
    """The whole answer to one request."""
    tokens: list[int] = []
    texts: list[str] = []
    reason: FinishReason = "cancelled"
    async for delta in engine.generate(request):
        tokens += delta.token_ids
        texts.append(delta.text)
        reason = delta.finish_reason or reason
    return Completion(tuple(tokens), "".join(texts), reason)
