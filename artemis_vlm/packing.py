"""Examples to packed batches: whole samples laid end to end, no padding between them, no attention across them.

Knows nothing of images or tokenizers; only of token ids, patches and where each goes.

Shapes: B samples, T tokens, P patches, I images, V image tokens, S supervised tokens, R tail tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import torch

from artemis_vlm.errors import SampleError
from artemis_vlm.examples import Example

#: Written over padding; any real id would do, since nothing attends to padding and no loss is taken there.
PAD_TOKEN: Final = 0


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Several examples as one row.

    input_ids, position_ids: int64 (T,); positions restart at 0 with each sample
    cu_seqlens: int32 (B + 1,); sample b is tokens cu_seqlens[b]:cu_seqlens[b + 1]
    max_length: tokens of the longest sample, padding included
    image_index: int64 (V,), the tokens that image features replace, in order
    loss_index, targets: int64 (S,); the hidden state at loss_index[s] predicts targets[s]
    tail_index: int64 (R,), each sample's tokens from its first supervised state to its end, the padding included
    cu_tails: int32 (B + 1,), where samples begin and end in tail_index; loss_row: int64 (S,), loss_index in tail_index
    patches: uint8 (P, 768); grid_thw: int64 (I, 3); cu_patches: int32 (I + 1,); max_patches: of the largest image
    n_padding: tokens appended to the last sample to reach a round length (causal, so harmless, and never supervised)
    """

    uids: tuple[str, ...]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    image_index: torch.Tensor
    loss_index: torch.Tensor
    targets: torch.Tensor
    tail_index: torch.Tensor
    cu_tails: torch.Tensor
    loss_row: torch.Tensor
    patches: torch.Tensor
    grid_thw: torch.Tensor
    cu_patches: torch.Tensor
    max_patches: int
    n_padding: int = 0

    @property
    def n_tokens(self) -> int:
        """Useful tokens: all but the padding."""
        return self.input_ids.shape[0] - self.n_padding

    @property
    def n_targets(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> PackedBatch:
        """A copy on the device; copies to a GPU are queued on the current stream, and nothing waits for them."""
        if device.type == "cpu":
            return self
        return self._each(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {k: change(v) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return PackedBatch(**values)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps memory that another stream filled until `stream` is done with it."""
        for field in fields(self):
            if isinstance(tensor := getattr(self, field.name), torch.Tensor):
                tensor.record_stream(stream)


def pack(examples: Sequence[Example], *, image_token_id: int, merge_size: int, pad_to: int = 1) -> PackedBatch:
    """Lays examples end to end; the row's length is padded up to a multiple of `pad_to` tokens at the very end.

    Raises:
        SampleError: an example whose placeholders and image features differ in number, or with nothing to predict.
    """
    for example in examples:
        placeholders, features = image_token_counts(example, image_token_id, merge_size)
        if placeholders != features:
            raise SampleError(f"{example.uid}: {placeholders} image placeholder tokens for {features} image features")
        if not 0 < example.n_prompt < example.n_tokens:
            raise SampleError(f"{example.uid}: {example.n_prompt} prompt tokens of {example.n_tokens}; nothing to predict")
    lengths = [e.n_tokens for e in examples]
    total = sum(lengths)
    n_padding = -total % pad_to
    lengths_padded = [*lengths[:-1], lengths[-1] + n_padding]
    ends = np.cumsum(lengths_padded)
    starts = ends - lengths_padded

    input_ids = np.full(total + n_padding, PAD_TOKEN, np.int64)
    input_ids[:total] = np.concatenate([e.input_ids for e in examples])
    # The state before a token predicts it.
    loss_index = np.concatenate([np.arange(s + e.n_prompt - 1, s + e.n_tokens - 1) for s, e in zip(starts, examples)])
    tails = [n - e.n_prompt + 1 for n, e in zip(lengths_padded, examples)]
    tail_index = np.concatenate([np.arange(end - n, end) for n, end in zip(tails, ends)])
    images = [e for e in examples if e.grid[0]]
    n_patches = [e.grid[0] * e.grid[1] for e in images]
    patches = np.concatenate([e.patches for e in images]) if images else np.empty((0, 0), np.uint8)
    return PackedBatch(
        uids=tuple(e.uid for e in examples),
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths_padded])),
        cu_seqlens=_boundaries(lengths_padded),
        max_length=max(lengths_padded),
        image_index=torch.from_numpy(np.flatnonzero(input_ids == image_token_id)),
        loss_index=torch.from_numpy(loss_index),
        targets=torch.from_numpy(input_ids[loss_index + 1]),
        tail_index=torch.from_numpy(tail_index),
        cu_tails=_boundaries(tails),
        loss_row=torch.from_numpy(np.searchsorted(tail_index, loss_index)),
        patches=torch.from_numpy(patches),
        grid_thw=torch.tensor([(1, *e.grid) for e in images], dtype=torch.int64).reshape(-1, 3),
        cu_patches=_boundaries(n_patches),
        max_patches=max(n_patches, default=0),
        n_padding=n_padding,
    )


def _boundaries(lengths: Sequence[int]) -> torch.Tensor:
    """int32 (n + 1,): where stretches of these lengths begin and end when laid end to end."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def image_token_counts(example: Example, image_token_id: int, merge_size: int) -> tuple[int, int]:
    """Placeholders in the text, and features that the image will give."""
    return int((example.input_ids == image_token_id).sum()), example.grid[0] * example.grid[1] // merge_size**2
