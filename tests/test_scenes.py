"""The demo's scenes: deterministic bytes, true captions, splits that keep their promise."""

import re
import tarfile
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from demo.scenes import (
    ALL_NAMES,
    COUNTS,
    DEMO_NAMES,
    NOUNS,
    POSITIONS,
    Scene,
    held_out,
    object_name_spans,
    scene,
    write_shards,
)

SPLITS = ("train", "heldout", "ood")
ADJECTIVES = "(?:(?:small|large|red|orange|yellow|green|blue|purple|pink|brown|black|white|gray) )*"


@pytest.fixture(scope="module", params=[(split, names) for split in SPLITS for names in (DEMO_NAMES, ALL_NAMES)])
def scenes(request: pytest.FixtureRequest) -> tuple[str, list[Scene]]:
    """A split and sixty of its scenes, with the 32 names and with all."""
    split, names = request.param
    return split, [scene(7, index, split=split, names=names) for index in range(60)]


def test_names_are_unique_nouns() -> None:
    assert len(ALL_NAMES) == len(set(ALL_NAMES)) == 670
    assert len(DEMO_NAMES) == len(set(DEMO_NAMES)) == 32
    assert all(NOUNS[name].plural for name in DEMO_NAMES)


def test_shards_are_equal_bytes_and_pair_images_with_captions(tmp_path: Path) -> None:
    a = write_shards(tmp_path / "a", count=7, seed=3, rows_per_shard=4)
    b = write_shards(tmp_path / "b", count=7, seed=3, rows_per_shard=4, workers=2)
    assert [path.name for path in a] == ["sa_000000.tar", "sa_000001.tar"]
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [path.name for path in a]
    with tarfile.open(a[1]) as tar:
        assert tar.getnames() == [f"{index:09d}.{suffix}" for index in (4, 5, 6) for suffix in ("jpg", "txt")]
        text = tar.extractfile("000000005.txt")
        assert text is not None
        assert text.read().decode() == scene(3, 5).caption  # any scene can be made alone


def test_seeds_and_splits_differ() -> None:
    assert len({scene(seed, 0, split=split).caption for seed in range(5) for split in SPLITS}) == 15


def test_sizes_and_boxes(scenes: tuple[str, list[Scene]]) -> None:
    for made in scenes[1]:
        width, height = made.image.size
        assert made.image.mode == "RGB"
        assert 128 <= min(width, height) <= max(width, height) <= 640
        for placed in made.objects:
            x1, y1, x2, y2 = placed.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert placed.position == POSITIONS[int(3 * (y1 + y2) / 2 / height)][int(3 * (x1 + x2) / 2 / width)]
        for a, b in combinations(made.objects, 2):
            assert a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]


def test_splits_keep_held_out_pairs_apart(scenes: tuple[str, list[Scene]]) -> None:
    split, made = scenes
    for one in made:
        pairs = [pair for pair in combinations({placed.name for placed in one.objects}, 2) if held_out(*pair)]
        assert split == "ood" or bool(pairs) == (split == "heldout")


def test_captions_name_what_was_placed_where_and_how_many(scenes: tuple[str, list[Scene]]) -> None:
    singular = {form: noun.name for noun in NOUNS.values() for form in (noun.plural, noun.name) if form}
    for made in scenes[1]:
        counts = Counter(placed.name for placed in made.objects)
        spoken = {singular[made.caption[start:end]] for start, end in object_name_spans(made.caption)}
        assert spoken == set(counts), made.caption
        for name, count in counts.items():
            word = NOUNS[name].plural if count > 1 else name
            number = "some" if NOUNS[name].plural is None else COUNTS[count] if count > 1 else "an?"
            assert re.search(rf"\b{number} {ADJECTIVES}{re.escape(word)}(?![\w-])", made.caption, re.I), made.caption
        assert all(placed.position in made.caption.lower() for placed in made.objects), made.caption


@pytest.mark.parametrize(
    ("caption", "names", "found"),
    [
        ("a pineapple and an apple", ["apple"], ["apple"]),
        ("a pineapple and an apple", ["apple", "pineapple"], ["pineapple", "apple"]),
        ("two green apples, an apple", ["apple", "green apple"], ["green apples", "apple"]),
        ("two mice and a computer mouse.", ["mouse", "computer mouse"], ["mice", "computer mouse"]),
        ("three glasses of milk", ["glass of milk", "glasses"], ["glasses of milk"]),
        ("a flip-flop and some yarn", ["yarn", "flip-flop"], ["flip-flop", "yarn"]),
        ("a scar, cards and carts", ["car"], []),
    ],
)
def test_object_name_spans(caption: str, names: list[str], found: list[str]) -> None:
    assert [caption[start:end] for start, end in object_name_spans(caption, names)] == found
