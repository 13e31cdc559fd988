"""Captioned scenes made of real art: what the embedded demo trains on, written as WebDataset shards.

    python -m demo.scenes --output DIR --split train --count 1000

A scene is a pure function of (seed, split, names, index), so any scene can be made alone and on any machine:

    Scene(image=<PIL RGB 480x360>, caption="On a plain teal background there are two cats and ...", objects=(...))

Splits test two kinds of generalisation. ``train`` and ``heldout`` draw from the Noto and Twemoji sheets; one pair of
object names in ten is *held out*: never together in a training scene, always (one at least) in a ``heldout`` scene.
``ood`` draws from the Fluent sheet, a style that training never sees.
"""

import argparse
import functools
import io
import json
import os
import random
import re
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, combinations, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

ART = Path(__file__).parent / "art"
CELL, COLUMNS = 72, 26  # layout of the sprite sheets, as vendor_art.py writes them


class Noun(NamedTuple):
    """How a caption speaks of an object; ``plural`` is None for what is named by mass ("some bread")."""

    name: str
    plural: str | None
    colour: str | None


NOUNS = {entry["name"]: Noun(**entry) for entry in json.loads((ART / "names.json").read_text(encoding="utf-8"))}
ALL_NAMES: tuple[str, ...] = tuple(NOUNS)
#: Names that are one token each: the small decoder repeats such a token at once, and spells longer names unwillingly.
DEMO_NAMES: tuple[str, ...] = (
    "cat", "dog", "elephant", "rabbit", "bird", "owl", "fish", "frog", "turtle", "butterfly", "spider", "rose",
    "tree", "apple", "banana", "pizza", "cookie", "mushroom", "car", "rocket", "house", "key",
    "bell", "guitar", "camera", "candle", "balloon", "umbrella", "star", "heart", "crown", "hammer",
)  # fmt: skip
SPLIT_STYLES = {"train": ("noto", "twemoji"), "heldout": ("noto", "twemoji"), "ood": ("fluent",)}

MIN_OBJECT = 46  # px a side once the image is scaled to MAX_AREA: about two vision tokens, the least one can recognise
MAX_AREA = 512 * 512  # px; what the demo's image processor keeps
SIZES = {"small": (0.16, 0.22), "medium": (0.28, 0.36), "large": (0.46, 0.58)}  # of the image's shorter side
ASPECTS = (1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)  # width / height
POSITIONS = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
PALETTE = {
    "white": (250, 250, 250), "light gray": (205, 205, 208), "dark gray": (88, 88, 92), "black": (18, 18, 20),
    "beige": (240, 225, 195), "pink": (250, 175, 200), "red": (205, 45, 45), "orange": (245, 150, 50),
    "yellow": (250, 220, 80), "light green": (165, 222, 150), "dark green": (35, 100, 55), "teal": (35, 150, 150),
    "light blue": (165, 210, 245), "dark blue": (30, 55, 125), "purple": (135, 80, 175), "brown": (125, 85, 55),
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """One object in a scene. ``box`` is (left, top, right, bottom) in pixels, tight around the opaque part."""

    name: str
    box: tuple[int, int, int, int]
    size: str  # key of SIZES
    position: str  # one of POSITIONS: the third of the width and of the height that holds the box's centre


@dataclass(frozen=True)
class Scene:
    """An RGB image, a caption that is true of it, and what was placed (all of a name together, in reading order)."""

    image: Image.Image
    caption: str
    objects: tuple[Placed, ...]


def scene(seed: int, index: int, *, split: str = "train", names: Sequence[str] = DEMO_NAMES) -> Scene:
    """Scene number ``index`` of a split: the same arguments always give the same scene."""
    rng = random.Random(f"{seed}/{split}/{index}")
    style = rng.choice(SPLIT_STYLES[split])
    width, height = draw_canvas(rng)
    chosen = choose_names(rng, split, names, limit=max(1, min(5, width * height // 16_000)))
    layout = place(rng, chosen, style, width, height)
    taken = {NOUNS[name].colour for name in chosen}
    canvas, background = draw_background(rng, width, height, [c for c in PALETTE if c.split()[-1] not in taken])
    for placed, sprite in layout:
        canvas.paste(sprite, placed.box[:2], mask=sprite)
    objects = tuple(placed for placed, _ in layout)
    return Scene(canvas, write_caption(rng, objects, background, width / height), objects)


def held_out(a: str, b: str) -> bool:
    """Whether this pair of names is kept from training scenes: one pair in ten, by a hash of the two names."""
    return zlib.crc32("|".join(sorted((a, b))).encode()) % 10 == 0


@functools.lru_cache(maxsize=8)
def held_out_pairs(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """All held-out pairs among ``names``."""
    pairs = tuple(pair for pair in combinations(names, 2) if held_out(*pair))
    if not pairs:
        raise ValueError(f"no pair among these {len(names)} names is held out; the heldout split needs more names")
    return pairs


def choose_names(rng: random.Random, split: str, names: Sequence[str], limit: int) -> list[str]:
    """One to ``limit`` distinct names that obey the split's rule on pairs (``heldout`` needs two at least)."""
    chosen = list(rng.choice(held_out_pairs(tuple(names)))) if split == "heldout" else [rng.choice(names)]
    wanted = rng.randint(len(chosen), max(len(chosen), limit))
    for name in rng.sample(names, min(len(names), 4 * wanted)):
        allowed = split != "train" or not any(held_out(name, other) for other in chosen)
        if len(chosen) < wanted and name not in chosen and allowed:
            chosen.append(name)
    return chosen


def draw_canvas(rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels, each from 128 to 640; small pictures are as likely as large ones (log-uniform)."""
    aspect = rng.choice(ASPECTS)
    longer = round(128 * 5 ** rng.random())
    shorter = max(128, round(longer * min(aspect, 1 / aspect)))
    return (longer, shorter) if aspect >= 1 else (shorter, longer)


@functools.cache
def sheet(style: str) -> Image.Image:
    """A style's sprite sheet (RGBA), decoded once in each process."""
    with Image.open(ART / f"{style}.webp") as image:
        return image.convert("RGBA")


@functools.cache
def sprite(style: str, name: str) -> Image.Image:
    """The art of one object (RGBA), cropped to its opaque part."""
    row, column = divmod(ALL_NAMES.index(name), COLUMNS)
    cell = sheet(style).crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    return cell.crop(cell.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())


def place(rng: random.Random, names: list[str], style: str, width: int, height: int) -> list[tuple[Placed, Image.Image]]:
    """Lay out one to three of each name without overlap. A draw that does not fit is drawn anew, with fewer of each.

    Names come in the reading order of their first object: what a caption lists is then a function of the image, not of
    the draw, and a model that reads it has nothing to guess.
    """
    shorter = min(width, height)
    least = MIN_OBJECT / shorter * max(1.0, (width * height / MAX_AREA) ** 0.5)
    sizes = [size for size, (low, _) in SIZES.items() if low >= least] or ["medium"]
    for attempt in range(200):
        most = 1 if attempt >= 4 or (len(names) > 3 and rng.random() < 0.5) else 3
        groups: list[list[tuple[Placed, Image.Image]]] = []
        for name in names:
            size = "medium" if attempt >= 20 and "medium" in sizes else rng.choice(sizes)
            count = rng.choice((1, 1, 1, 2, 3)[: most + 2]) if NOUNS[name].plural else 1
            group: list[tuple[Placed, Image.Image]] = []
            for _ in range(count):
                low, high = SIZES[size]
                image = pose(rng, sprite(style, name), max(rng.uniform(low, high) * shorter, least * shorter))
                spot = free_spot(rng, image.size, width, height, [p.box for p, _ in [*chain(*groups), *group]])
                if spot is not None:
                    group.append((Placed(name, spot[0], size, spot[1]), image))
            if len(group) < count:
                break
            groups.append(sorted(group, key=lambda item: reading_order(item[0])))
        else:
            return list(chain(*sorted(groups, key=lambda group: reading_order(group[0][0]))))
    raise ValueError(f"{len(names)} objects do not fit in {width}x{height} pixels")


def pose(rng: random.Random, art: Image.Image, side: float) -> Image.Image:
    """Scale art so that its longer side is ``side`` pixels, then mirror, tilt and light it a little."""
    scale = side / max(art.size)
    art = art.resize((max(8, round(art.width * scale)), max(8, round(art.height * scale))), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        art = art.rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC, expand=True)
        art = art.crop(art.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    return ImageEnhance.Brightness(art).enhance(rng.uniform(0.88, 1.1))


def free_spot(
    rng: random.Random, size: tuple[int, int], width: int, height: int, taken: list[tuple[int, int, int, int]]
) -> tuple[tuple[int, int, int, int], str] | None:
    """A random box of this size that touches no other, and the name of its position; None if 40 draws find none."""
    w, h = size
    if w > width or h > height:
        return None
    for _ in range(40):
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        u, v = 3 * (x + w / 2) / width, 3 * (y + h / 2) / height
        # A centre close to a line between two thirds would be named by a coin toss: draw again.
        on_line = any(abs(c - line) < 0.1 for c in (u, v) for line in (1, 2))
        if not on_line and not any(x < x2 and x1 < x + w and y < y2 and y1 < y + h for x1, y1, x2, y2 in taken):
            return (x, y, x + w, y + h), POSITIONS[int(v)][int(u)]
    return None


def reading_order(placed: Placed) -> tuple[int, int]:
    """Sorts objects by position, row by row from the top left, and within one position from left to right."""
    return [name for row in POSITIONS for name in row].index(placed.position), placed.box[0]


def draw_background(rng: random.Random, width: int, height: int, colours: list[str]) -> tuple[Image.Image, str]:
    """A background in one or two of ``colours`` and the noun phrase that describes it."""
    first, second = rng.sample(colours, 2)
    texture = np.random.default_rng(rng.getrandbits(64))
    base = np.array(PALETTE[first], np.float32) + texture.uniform(-6, 6, 3).astype(np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    kind = rng.choice(("plain", "plain", "fade", "fade", "stripes", "checks", "dots", "grain"))
    step = rng.uniform(14, 36)  # px: the period of a pattern
    shade = rng.choice((-26, 26)) if 60 < base.mean() < 200 else (-26 if base.mean() >= 200 else 26)
    if kind == "fade":
        vertical = rng.random() < 0.5
        share = (y / height if vertical else x / width)[..., None]
        pixels = base + share * (np.array(PALETTE[second], np.float32) - base)
        ends = ("at the top", "at the bottom") if vertical else ("on the left", "on the right")
        phrase = f"a background that fades from {first} {ends[0]} to {second} {ends[1]}"
    elif kind == "stripes":
        vertical = rng.random() < 0.5
        pixels = base + shade * ((x if vertical else y) % step < step / 2)[..., None]
        phrase = f"a {first} background with faint {'vertical' if vertical else 'horizontal'} stripes"
    elif kind == "checks":
        pixels = base + shade * ((x // step + y // step) % 2)[..., None]
        phrase = f"a checked {first} background"
    elif kind == "dots":
        distance = ((x % step) / step - 0.5) ** 2 + ((y % step) / step - 0.5) ** 2
        pixels = base + shade * (distance < 0.05)[..., None]
        phrase = f"a dotted {first} background"
    elif kind == "grain":
        pixels = base + texture.normal(0, 13, (height, width, 1)).astype(np.float32)
        phrase = f"a grainy {first} background"
    else:
        pixels = np.broadcast_to(base, (height, width, 3))
        phrase = f"a plain {first} background"
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), phrase


def write_caption(rng: random.Random, objects: Sequence[Placed], background: str, aspect: float) -> str:
    """Describe a scene in varied English: what there is, where each thing is, and a few more facts."""
    groups = [list(group) for _, group in groupby(objects, key=lambda placed: placed.name)]
    phrases, details = [], []
    for group in groups:
        phrase, detail = describe(rng, group)
        phrases.append(phrase)
        details.append(detail)
    listing = join(phrases)
    one = len(groups[0]) == 1 and verb(groups[0][0].name) == "is"
    opening = rng.choice(
        (
            f"The picture shows {listing} on {background}.",
            f"This image contains {listing}, set against {background}.",
            f"On {background} there {'is' if one else 'are'} {listing}.",
            f"An illustration of {listing}. Behind {'it' if len(objects) == 1 else 'them'} is {background}.",
            f"We see {listing} in front of {background}.",
        )
    )
    return " ".join([opening, *details, *closing(rng, objects, groups, aspect)])


def describe(rng: random.Random, group: list[Placed]) -> tuple[str, str]:
    """The noun phrase of one group ("two small green cactuses") and the sentences on where it is and how it looks."""
    noun, size = NOUNS[group[0].name], group[0].size
    count = len(group)
    word = noun.plural if count > 1 and noun.plural else noun.name
    # "green book" is an object of its own, and a "red envelope" needs no second "red".
    sayable = noun.colour and noun.colour not in word and f"{noun.colour} {noun.name}" not in NOUNS
    colour = noun.colour if sayable else None
    say_size, say_colour = rng.choice(("before", "after", "never")), rng.choice(("before", "before", "after", "never"))
    adjectives = [size] if say_size == "before" and size != "medium" else []
    adjectives += [colour] if say_colour == "before" and colour else []
    phrase = " ".join((*adjectives, word))
    if noun.plural is None:
        phrase = f"some {phrase}"
    elif count > 1:
        phrase = f"{COUNTS[count]} {phrase}"
    else:
        phrase = f"{'an' if re.match(r'[aeio]|u(?!ni)|x-|hour', phrase) else 'a'} {phrase}"

    sentences = [where(rng, noun.name, word, [placed.position for placed in group])]
    facts = [f"{size}-sized" if size == "medium" else size] if say_size == "after" else []
    facts += [f"mostly {colour}"] if say_colour == "after" and colour else []
    if facts:
        subject = "It" if count == 1 and verb(word) == "is" else "They"
        sentences.append(f"{subject} {'is' if subject == 'It' else 'are'} {join(facts)}.")
    return phrase, " ".join(sentences)


def where(rng: random.Random, name: str, word: str, positions: list[str]) -> str:
    """One sentence on the positions (in reading order) of one to three objects of a name."""
    distinct = list(dict.fromkeys(positions))
    if len(positions) == 1:
        be = verb(name)
        return rng.choice(
            (
                f"The {word} {be} {positions[0]}.",
                f"The {word} {be} {positions[0]} of the picture.",
                f"{positions[0].capitalize()} {be} the {word}.",
                f"You can find the {word} {positions[0]}.",
            )
        )
    if len(distinct) == 1:
        return f"{'Both' if len(positions) == 2 else 'All three'} {word} are {distinct[0]}."
    if len(positions) == 2:
        return f"One {name} is {positions[0]} and the other {positions[1]}."
    if len(distinct) == 2:
        twice = max(distinct, key=positions.count)
        return f"Two of the {word} are {twice} and the third is {min(distinct, key=positions.count)}."
    return f"The {word} are {join(positions)}."


def closing(rng: random.Random, objects: Sequence[Placed], groups: list[list[Placed]], aspect: float) -> list[str]:
    """Zero to three sentences on how two single objects lie, how many objects there are, and the picture's shape."""
    sentences = []
    singles = [group[0] for group in groups if len(group) == 1]
    if len(singles) >= 2 and rng.random() < 0.7:
        a, b = rng.sample(singles, 2)
        relations = (
            ("to the left of", a.box[2] <= b.box[0]),
            ("to the right of", a.box[0] >= b.box[2]),
            ("above", a.box[3] <= b.box[1]),
            ("below", a.box[1] >= b.box[3]),
        )
        # Boxes never overlap, so at least one relation holds.
        relation = rng.choice([relation for relation, holds in relations if holds])
        sentences.append(f"The {a.name} {verb(a.name)} {relation} the {b.name}.")
    total = len(objects)
    countable = total < len(COUNTS) and all(NOUNS[placed.name].plural for placed in objects)
    if countable and (len(groups) == 1 or rng.random() < 0.4):
        sentences.append(f"There {'is one object' if total == 1 else f'are {COUNTS[total]} objects'} in total.")
    shape = "wide" if aspect > 1.2 else "tall" if aspect < 1 / 1.2 else "square" if 0.98 < aspect < 1.02 else None
    if shape and (len(groups) == 1 or rng.random() < 0.35):
        sentences.append(rng.choice(("The picture is {}.", "It is a {} picture, and nothing else is in it.")).format(shape))
    return sentences


def verb(word: str) -> str:
    """``is`` or ``are`` for a noun used without a number: "the bread is", "the grapes are"."""
    return "are" if word not in NOUNS or (NOUNS[word].plural is None and re.search("[^s]s$", word)) else "is"


def join(items: Sequence[str]) -> str:
    """``["a", "b", "c"] -> "a, b and c"``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def object_name_spans(caption: str, names: Iterable[str] = ALL_NAMES) -> list[tuple[int, int]]:
    """Character spans (start, end) of object names in a caption, in order, singular or plural.

    Whole words only ("apple" is not in "pineapple"), and the longest name wins ("green apple" before "apple").
    """
    return [match.span() for match in name_pattern(tuple(names)).finditer(caption)]


@functools.lru_cache(maxsize=16)
def name_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """One alternation of all forms, longest first, since ``re`` takes the first that matches."""
    forms = {form for name in names for form in (name, NOUNS[name].plural) if form}
    ordered = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, ordered))})(?![\w-])")


def write_shards(
    folder: str | Path,
    *,
    split: str = "train",
    names: Sequence[str] = DEMO_NAMES,
    count: int = 1000,
    seed: int = 0,
    rows_per_shard: int = 500,
    workers: int = 1,
) -> list[Path]:
    """Write scenes 0..count-1 as BLIP3o-style shards ``sa_%06d.tar``; the same arguments give the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, rows_per_shard)
    paths = [folder / f"sa_{number:06d}.tar" for number in range(len(starts))]
    ranges = [range(start, min(start + rows_per_shard, count)) for start in starts]
    write = functools.partial(write_shard, split=split, names=tuple(names), seed=seed)
    if workers == 1:
        list(map(write, paths, ranges))
    else:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(write, paths, ranges))
    return paths


def write_shard(path: Path, indices: range, *, split: str, names: Sequence[str], seed: int) -> None:
    """One tar with ``<index>.jpg`` and ``<index>.txt`` for each scene. It appears under its name only when complete."""
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            made = scene(seed, index, split=split, names=names)
            jpeg = io.BytesIO()
            made.image.save(jpeg, "JPEG", quality=90)
            for suffix, data in (("jpg", jpeg.getvalue()), ("txt", made.caption.encode())):
                member = tarfile.TarInfo(f"{index:09d}.{suffix}")  # mtime 0, no owner: bytes depend on content alone
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    os.replace(partial, path)


def main() -> None:
    """The command line: write one split as shards."""
    parser = argparse.ArgumentParser(description="Write captioned scenes as WebDataset shards.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--split", choices=SPLIT_STYLES, default="train")
    parser.add_argument("--names", choices=("demo", "all"), default="demo", help="32 common names, or all of them")
    parser.add_argument("--count", type=int, default=1000, help="scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-per-shard", type=int, default=500)
    parser.add_argument("--workers", type=int, default=1, help="processes, each writing whole shards")
    args = parser.parse_args()
    paths = write_shards(
        args.output,
        split=args.split,
        names=DEMO_NAMES if args.names == "demo" else ALL_NAMES,
        count=args.count,
        seed=args.seed,
        rows_per_shard=args.rows_per_shard,
        workers=args.workers,
    )
    print(f"{args.count} scenes in {len(paths)} shards under {args.output}")


if __name__ == "__main__":
    main()
