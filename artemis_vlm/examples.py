"""Training samples as arrays, and their division into groups. Knows nothing of torch: what prepares data starts fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One training sample: a prompt with its image placeholders expanded, then the target.

    uid: names the sample for ever, `shard/key`
    input_ids: int32 (T,); the target is `input_ids[n_prompt:]`
    patches: uint8 (P, 768) merge-ordered, or (0, 768) without an image
    grid: height and width in patches, (0, 0) without an image
    """

    uid: str
    input_ids: npt.NDArray[np.int32]
    n_prompt: int
    patches: npt.NDArray[np.uint8]
    grid: tuple[int, int]

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def n_targets(self) -> int:
        return len(self.input_ids) - self.n_prompt


def split_by_tokens(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of samples in `parts` groups of nearly equal token sums; longest first into the emptiest group.

    Deterministic; within a group the samples keep their order. Never more groups than samples.
    """
    groups: list[list[int]] = [[] for _ in range(min(parts, len(lengths)))]
    sums = [0] * len(groups)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        smallest = min(range(len(groups)), key=lambda g: (sums[g], len(groups[g]), g))
        groups[smallest].append(index)
        sums[smallest] += lengths[index]
    return [sorted(group) for group in groups]
