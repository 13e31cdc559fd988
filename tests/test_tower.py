"""The shipped vision tower: Qwen3-VL's own class loads it, and its tokens tell objects apart without training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLVisionModel

from artemis_vlm.image import ImageSpec
from demo.scenes import DEMO_NAMES
from demo.train_tower import SPEC, BatchedTower, example, features, tokens_in

TOWER = Path(__file__).parent.parent / "demo" / "tower"
NAMES = DEMO_NAMES[:8]


@pytest.fixture(scope="module")
def tower() -> Iterator[Qwen3VLVisionModel]:
    """The tower in float32, on one thread: its pictures are small, and waiting threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Qwen3VLVisionModel.from_pretrained(TOWER, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def object_features(tower: Qwen3VLVisionModel, split: str, count: int) -> tuple[Tensor, list[str]]:
    """The mean token (unit length) and the name of each object in ``count`` scenes."""
    vectors, names = [], []
    for index in range(count):
        patches, size, objects = example(index, split, NAMES)
        tokens = features(tower, patches)
        for placed in objects:
            vectors.append(F.normalize(tokens[tokens_in(placed, size, patches.grid)].mean(0), dim=0))
            names.append(placed.name)
    return torch.stack(vectors), names


def test_files_are_small_and_carry_the_pixel_spec(tower: Qwen3VLVisionModel) -> None:
    assert ImageSpec.load(TOWER) == SPEC
    assert tower.config.deepstack_visual_indexes == []
    assert (TOWER / "model.safetensors").stat().st_size < 14_000_000


def test_batched_forward_equals_transformers(tower: Qwen3VLVisionModel) -> None:
    patches, _, _ = example(1, "train", NAMES)
    h, w = patches.grid
    tiles = torch.from_numpy(patches.pixels).reshape(h // 2, w // 2, 2, 2, 3, 16, 16)
    image = tiles.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, 16 * h, 16 * w) / 255
    with torch.no_grad():
        torch.testing.assert_close(BatchedTower(tower)(image)[0], features(tower, patches), atol=1e-3, rtol=1e-4)


def test_nearest_centroid_names_objects_of_held_out_scenes(tower: Qwen3VLVisionModel) -> None:
    vectors, names = object_features(tower, "train", 18)
    known = sorted(set(names))
    centroids = torch.stack([vectors[[n == name for n in names]].mean(0) for name in known])
    vectors, names = object_features(tower, "heldout", 8)
    told = [known[i] for i in (vectors @ centroids.T).argmax(1).tolist()]
    right = sum(a == b for a, b in zip(told, names, strict=True))
    assert len(known) == len(NAMES)
    assert right >= 0.9 * len(names), f"{right} of {len(names)}"
