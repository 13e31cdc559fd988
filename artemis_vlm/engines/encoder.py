"""Images to the decoder's embeddings: the frozen tower and the projector, without the decoder.

Serving and captioning both run one of these. Images of any sizes go through the tower in one packed call; what was
encoded is kept by the caller's key, least recently used out first, within a bound in bytes.

Knows nothing of files or formats: see `image` for how bytes become patches.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from artemis_vlm import graft
from artemis_vlm.engines.base import ImageEmbedding
from artemis_vlm.image import ImageSpec, Patches
from artemis_vlm.modeling import ArtemisVLMProjector
from artemis_vlm.packed import PackedTower

#: Patches in one call of the tower: 16 images of 512x512. More would cost memory and gain nothing.
PACK_PATCHES: Final = 16 * 1024
CACHE_BYTES: Final = 256 * 1024**2


def image_key(data: bytes) -> str:
    """The name of an image file's content."""
    return hashlib.sha256(data).hexdigest()


class ImageEncoder:
    """Encodes batches of images. May be called from several threads; the tower runs in one at a time."""

    def __init__(
        self, visual: Qwen3VLVisionModel, projector: ArtemisVLMProjector, spec: ImageSpec, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.visual, self.projector, self.spec = visual, projector, spec
        self.packed = PackedTower(visual, spec)
        self._tower = threading.Lock()
        self.cache = EmbeddingCache(0)
        if self.packed.compile_it:  # now, not in the first request
            side = spec.merge_size
            self._encode([("", Patches(np.zeros((side**2, spec.patch_bytes), np.uint8), (side, side)))] * 2)
        self.cache = EmbeddingCache(cache_bytes)

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        cache_bytes: int = CACHE_BYTES,
        spec: ImageSpec | None = None,
    ) -> ImageEncoder:
        """From an A3 folder, reading only the tower's and the projector's tensors.

        Args:
            dtype: of both; None takes that in which the projector is stored.
            spec: what images will be cut by, if not the folder's own.

        Raises:
            CheckpointError: parts missing or damaged, or they do not fit each other.
        """
        state = graft.read_projector(folder)
        inside, outside = state["fc1.weight"].shape[1], state["fc2.weight"].shape[0]
        projector = ArtemisVLMProjector(inside, outside, graft.load_config(folder).projector_hidden_act)
        graft.load_projector(projector, state)
        dtype = dtype or state["fc1.weight"].dtype
        tower = graft.load_tower(folder, dtype, device)
        tower.deepstack_visual_indexes = []  # nothing reads what they would compute
        return cls(tower, projector.to(device, dtype).requires_grad_(False), spec or ImageSpec.load(folder), cache_bytes)

    def encode(self, images: Sequence[tuple[str, Patches]]) -> list[ImageEmbedding]:
        """Embeddings of images in order; those whose key is cached, or repeated in the batch, are not computed again.

        Args:
            images: (key, patches); equal keys must mean equal patches.
        """
        found = {key: hit for key, _ in images if (hit := self.cache.get(key)) is not None}
        missing = {key: patches for key, patches in images if key not in found}
        for group in _groups(missing):
            found |= {e.key: e for e in self._encode(group)}
        return [found[key] for key, _ in images]

    def project(self, pixels: torch.Tensor, grid: torch.Tensor, ends: torch.Tensor, largest: int) -> torch.Tensor:
        """Embeddings (V, H) of patches that are on the device; the arguments are `PackedTower.features`'s."""
        return self.projector(self.packed.features(pixels, grid, ends, largest))  # type: ignore[no-any-return]

    def _encode(self, group: Sequence[tuple[str, Patches]]) -> list[ImageEmbedding]:
        pixels = torch.from_numpy(np.concatenate([p.pixels for _, p in group]))
        grid = torch.tensor([(1, *p.grid) for _, p in group], dtype=torch.int64)
        sizes = [len(p.pixels) for _, p in group]
        ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        counts = [self.spec.tokens(p.grid) for _, p in group]
        with self._tower, torch.inference_mode():
            pixels, grid, ends = (t.to(self.visual.device) for t in (pixels, grid, ends))
            embeds = self.project(pixels, grid, ends, max(sizes))
            # an image by itself: a view would keep the whole group alive for as long as one image is cached
            parts = [part.to("cpu", copy=True) for part in torch.split(embeds, counts)]
        encoded = [ImageEmbedding(key, part, patches.grid) for (key, patches), part in zip(group, parts)]
        for each in encoded:
            self.cache.put(each)
        return encoded


class EmbeddingCache:
    """Embeddings by key, least recently used out first, never more than `max_bytes` in all."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[str, ImageEmbedding] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> ImageEmbedding | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry

    def put(self, entry: ImageEmbedding) -> None:
        """Keeps an embedding, unless it alone is larger than the bound."""
        if entry.nbytes > self.max_bytes:
            return
        with self._lock:
            if (old := self._entries.pop(entry.key, None)) is not None:
                self.nbytes -= old.nbytes
            self._entries[entry.key] = entry
            self.nbytes += entry.nbytes
            while self.nbytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.nbytes -= dropped.nbytes


def _groups(images: dict[str, Patches]) -> Iterator[list[tuple[str, Patches]]]:
    """Images in order, in groups of at most PACK_PATCHES patches (one image may be larger alone)."""
    group: list[tuple[str, Patches]] = []
    room = PACK_PATCHES
    for key, patches in images.items():
        if group and len(patches.pixels) > room:
            yield group
            group, room = [], PACK_PATCHES
        group.append((key, patches))
        room -= len(patches.pixels)
    if group:
        yield group
