"""Rebuild ``demo/art`` from unpacked npm packages: one sprite sheet per style and one ``names.json``.

    python -m demo.vendor_art --google DIR --twitter DIR --fluent DIR --emojibase DIR

Each DIR is the unpacked package (the folder that holds ``package.json``). An object is kept when all three styles
draw it, when its name is a noun one can place in a scene, and when no other kept object looks the same.
"""

# ruff: noqa: RUF001  (labels as emojibase spells them; a list of 60 names reads best as one string)

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ART = Path(__file__).parent / "art"
CELL = 72  # px; the Noto and Twemoji files are 64 px (kept as they are), Fluent (256 px) is reduced to the full cell
COLUMNS = 26  # cells a row: the sheets come out nearly square
KEPT_GROUPS = (3, 4, 5, 6, 7)  # emojibase: animals, food, travel, activities, objects
# From the groups of faces and people only these.
EXTRA = [
    "skull",
    "ghost",
    "alien",
    "robot",
    "goblin",
    "clown face",
    "red heart",
    "broken heart",
    "kiss mark",
    "collision",
    "speech balloon",
    "mechanical arm",
    "mechanical leg",
    "ear",
    "nose",
    "brain",
    "anatomical heart",
    "lungs",
    "tooth",
    "bone",
    "eye",
    "tongue",
    "mouth",
    "footprints",
]
# Not a thing one can place in a scene, or a look-alike of a kept one.
DROP = (
    "oncoming.*|.*o’clock|.*-thirty|"
    "guide dog|service dog|ewe|two-hump camel|hatching chick|front-facing baby chick|wing|black bird|tropical fish|"
    "lady beetle|rosette|blossom|leaf fluttering in wind|nest with eggs|cooking|steaming bowl|fish cake with swirl|"
    "bottle with popping cork|clinking glasses|tumbler glass|pouring liquid|globe showing Americas|"
    "globe showing Asia-Australia|globe with meridians|map of Japan|mountain|beach with umbrella|desert|"
    "national park|houses|office building|Japanese post office|post office|bank|hotel|love hotel|department store|"
    "wedding|kaaba|foggy|night with stars|cityscape|sunrise over mountains|sunrise|cityscape at dusk|sunset|"
    "hot springs|carousel horse|railway car|bullet train|train|light rail|mountain railway|tram car|trolleybus|"
    "minibus|motorway|railway track|police car light|construction|passenger ship|ferry|motor boat|small airplane|"
    "airplane departure|airplane arrival|suspension railway|aerial tramway|hourglass not done|timer clock|new moon|"
    "waxing crescent moon|first quarter moon|waxing gibbous moon|waning gibbous moon|last quarter moon|"
    "waning crescent moon|new moon face|first quarter moon face|last quarter moon face|full moon face|"
    "sun with face|glowing star|milky way|sun behind cloud|cloud with lightning and rain|sun behind small cloud|"
    "sun behind rain cloud|cloud with rain|cloud with snow|fog|wind face|umbrella|umbrella on ground|"
    "snowman without snow|sparkles|tanabata tree|pine decoration|Japanese dolls|moon viewing ceremony|"
    "reminder ribbon|ticket|1st place medal|2nd place medal|3rd place medal|softball|cricket game|field hockey|"
    "ice hockey|spade suit|heart suit|diamond suit|club suit|mahjong red dragon|performing arts|one-piece swimsuit|"
    "briefs|woman’s clothes|muted speaker|speaker low volume|speaker medium volume|speaker high volume|"
    "bell with slash|musical notes|level slider|long drum|mobile phone with arrow|low battery|optical disk|dvd|"
    "camera with flash|magnifying glass tilted right|books|notebook|ledger|page with curl|page facing up|bookmark|"
    "yen banknote|euro banknote|pound banknote|chart increasing with yen|e-mail|incoming envelope|"
    "envelope with arrow|outbox tray|inbox tray|closed mailbox with lowered flag|open mailbox with raised flag|"
    "open mailbox with lowered flag|pen|file folder|open file folder|card index dividers|calendar|spiral calendar|"
    "card index|chart decreasing|linked paperclips|unlocked|locked with pen|locked with key|hammer and pick|"
    "hammer and wrench|nut and bolt|link|chains|mouse trap|lotion bottle|nazar amulet|pile of poo|cigarette|"
    "firecracker|notebook with decorative cover|flower playing cards|round pushpin"
)
RENAME = {
    "kiss mark": "lipstick mark", "collision": "explosion", "speech balloon": "speech bubble",
    "thought balloon": "thought bubble", "mechanical arm": "robot arm", "mechanical leg": "robot leg",
    "boar": "wild boar", "ram": "sheep", "T-Rex": "tyrannosaurus", "spouting whale": "blue whale",
    "blowfish": "pufferfish", "spiral shell": "seashell", "bug": "caterpillar", "honeybee": "bee",
    "cricket": "grasshopper", "white flower": "flower stamp", "lotus": "lotus flower", "evergreen tree": "pine tree",
    "deciduous tree": "tree", "sheaf of rice": "rice plant", "red apple": "apple", "kiwi fruit": "kiwi",
    "ear of corn": "corn cob", "leafy green": "lettuce", "meat on bone": "meat joint", "poultry leg": "chicken leg",
    "cut of meat": "steak", "stuffed flatbread": "pita", "shallow pan of food": "paella pan",
    "pot of food": "stew pot", "bowl with spoon": "soup bowl", "green salad": "salad", "canned food": "food can",
    "cooked rice": "rice bowl", "curry rice": "curry plate", "roasted sweet potato": "sweet potato",
    "fried shrimp": "fried prawn", "soft ice cream": "ice cream cone", "ice cream": "sundae",
    "birthday cake": "cake", "pie": "slice of pie", "hot beverage": "coffee cup",
    "teacup without handle": "tea bowl", "sake": "sake bottle", "clinking beer mugs": "pair of beer mugs",
    "cup with straw": "soda cup", "beverage box": "juice box", "mate": "mate gourd", "ice": "ice cube",
    "fork and knife with plate": "dinner plate", "fork and knife": "cutlery", "globe showing Europe-Africa": "globe",
    "snow-capped mountain": "snowy mountain", "camping": "campsite", "classical building": "ancient temple",
    "building construction": "building site", "wood": "wood log", "house with garden": "cottage",
    "hindu temple": "temple", "bridge at night": "suspension bridge", "locomotive": "steam train",
    "high-speed train": "fast train", "station": "railway station", "automobile": "car",
    "sport utility vehicle": "off-road car", "articulated lorry": "lorry", "manual wheelchair": "wheelchair",
    "motorized wheelchair": "electric wheelchair", "wheel": "car wheel", "vertical traffic light": "traffic light",
    "ring buoy": "lifebuoy", "ship": "cruise ship", "seat": "airplane seat", "mountain cableway": "cable car",
    "bellhop bell": "desk bell", "hourglass done": "hourglass", "mantelpiece clock": "mantel clock",
    "crescent moon": "moon", "sun behind large cloud": "sunny cloud", "cloud with lightning": "thundercloud",
    "high voltage": "lightning bolt", "fire": "flame", "droplet": "water drop", "ribbon": "hair bow",
    "tennis": "tennis ball", "flying disc": "frisbee", "bowling": "bowling ball", "lacrosse": "lacrosse stick",
    "ping pong": "table tennis bat", "badminton": "shuttlecock", "martial arts uniform": "judo suit",
    "goal net": "football goal", "flag in hole": "golf flag", "running shirt": "running vest",
    "pool 8 ball": "billiard ball", "game die": "die", "flower playing cards": "hanafuda card", "knot": "rope knot",
    "thong sandal": "flip-flop", "man’s shoe": "brown shoe", "running shoe": "trainer", "woman’s sandal": "sandal",
    "woman’s boot": "boot", "hair pick": "afro comb", "woman’s hat": "sun hat", "billed cap": "cap",
    "rescue worker’s helmet": "safety helmet", "musical score": "treble clef", "musical keyboard": "piano keyboard",
    "computer disk": "minidisc", "magnifying glass tilted left": "magnifying glass",
    "rolled-up newspaper": "rolled newspaper", "dollar banknote": "dollar note",
    "money with wings": "flying banknote", "closed mailbox with raised flag": "mailbox",
    "ballot box with ballot": "ballot box", "black nib": "pen nib", "memo": "memo sheet",
    "chart increasing": "line chart", "card file box": "card box", "locked": "padlock", "carpentry saw": "saw",
    "dna": "dna helix", "satellite antenna": "satellite dish", "adhesive bandage": "plaster", "x-ray": "x-ray image",
    "couch and lamp": "couch", "shower": "shower head", "basket": "woven basket", "roll of paper": "toilet roll",
    "funeral urn": "urn", "placard": "protest sign", "identification card": "identity card", "red heart": "heart",
    "umbrella with rain drops": "umbrella", "headphone": "headphones", "baguette bread": "baguette",
}  # fmt: skip
# Named in the plural or by mass: a scene holds one of them and the caption says "some grapes", "some bread".
MASS = [
    "grapes",
    "cherries",
    "blueberries",
    "peanuts",
    "beans",
    "bread",
    "broccoli",
    "garlic",
    "popcorn",
    "salt",
    "butter",
    "bacon",
    "pancakes",
    "french fries",
    "spaghetti",
    "sushi",
    "oden",
    "dango",
    "chopsticks",
    "cutlery",
    "paw prints",
    "footprints",
    "lungs",
    "glasses",
    "sunglasses",
    "goggles",
    "jeans",
    "gloves",
    "socks",
    "shorts",
    "ballet shoes",
    "shopping bags",
    "skis",
    "scissors",
    "maracas",
    "bubbles",
    "admission tickets",
    "prayer beads",
    "film frames",
    "control knobs",
    "bookmark tabs",
    "nesting dolls",
    "crossed swords",
    "fireworks",
    "yarn",
    "thread",
    "soap",
    "lettuce",
    "fondue",
    "falafel",
    "coral",
    "headphones",
    "shaved ice",
    "luggage",
]
PLURALS = {
    "mouse": "mice", "computer mouse": "computer mice", "wolf": "wolves", "fish": "fish", "sheep": "sheep",
    "deer": "deer", "bison": "bison", "moose": "moose", "ox": "oxen", "water buffalo": "water buffaloes",
    "goose": "geese", "squid": "squid", "kitchen knife": "kitchen knives", "maple leaf": "maple leaves",
    "fallen leaf": "fallen leaves", "die": "dice", "scarf": "scarves", "tomato": "tomatoes", "potato": "potatoes",
    "sweet potato": "sweet potatoes", "mango": "mangoes", "volcano": "volcanoes", "tooth": "teeth",
    "bow and arrow": "bows and arrows", "mosquito": "mosquitoes", "snowman": "snowmen", "tornado": "tornadoes",
}  # fmt: skip
HUES = ((16, "red"), (44, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (290, "purple"), (338, "pink"))


def plural(name: str) -> str:
    """``"glass of milk" -> "glasses of milk"``: the head is the word before a preposition, else the last one."""
    if name in PLURALS:
        return PLURALS[name]
    head, *rest = re.split(r"(?= (?:of|with|in|on) )", name, maxsplit=1)
    tail = "".join(rest)
    if re.search(r"(s|x|z|ch|sh)$", head):
        return head + "es" + tail
    if re.search(r"[^aeiou]y$", head):
        return head[:-1] + "ies" + tail
    return head + "s" + tail


def colour(sprite: Image.Image) -> str | None:
    """The colour word of at least 55 % of the opaque pixels of an RGBA sprite, or None when no colour has so many."""
    pixels = np.asarray(sprite).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 200]
    hsv = np.asarray(Image.fromarray(pixels[None, :, :3]).convert("HSV"))[0].astype(int)
    words = Counter(colour_word(h * 360 // 255, s * 100 // 255, v * 100 // 255) for h, s, v in hsv)
    word, count = words.most_common(1)[0]
    return word if count >= 0.55 * len(pixels) else None


def colour_word(hue: int, saturation: int, value: int) -> str | None:
    """A plain colour word for hue in degrees, saturation and value in per cent, None where people would differ."""
    if value < 22:
        return "black"
    if saturation < 14:
        return "white" if value > 82 else "gray"
    if hue < 44 and (value < 80 or saturation < 66) and not (hue < 10 and saturation > 70):
        return "brown" if value < 85 else None  # a pale orange is tan, beige or skin: no word that all would use
    return next((word for limit, word in HUES if hue < limit), "red")


def find(folder: Path, hexcode: str) -> Path | None:
    """The image of a code point; packages disagree on whether its name carries the presentation selector fe0f."""
    code = hexcode.lower()
    candidates = (folder / (c + suffix) for c in (code, f"{code}-fe0f", code.replace("-fe0f", ""))
                  for suffix in (".png", ".webp"))  # fmt: skip
    return next((path for path in candidates if path.exists()), None)


def record(label: str, sprites: list[Image.Image]) -> dict[str, Any]:
    """One entry of names.json: ``name``, ``plural`` (null for mass nouns), ``colour`` (null unless styles agree)."""
    name = RENAME.get(label, label).lower()
    colours = {colour(sprite) for sprite in sprites}
    return {
        "name": name,
        "plural": None if name in MASS else plural(name),
        "colour": colours.pop() if len(colours) == 1 else None,
    }


def main() -> None:
    """Read the packages, choose the objects, write the sheets and the names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for package in ("google", "twitter", "fluent", "emojibase"):
        parser.add_argument(f"--{package}", type=Path, required=True)
    args = parser.parse_args()
    folders = {
        "noto": args.google / "img/google/64",
        "twemoji": args.twitter / "img/twitter/64",
        "fluent": args.fluent / "assets",
    }
    names, kept = [], []
    for entry in json.loads((args.emojibase / "en/data.json").read_text()):
        label = entry["label"]
        if label not in EXTRA and (entry.get("group") not in KEPT_GROUPS or re.fullmatch(DROP, label)):
            continue
        paths = [find(folder, entry["hexcode"]) for folder in folders.values()]
        found = [path for path in paths if path]
        if len(found) < len(folders):
            continue
        sprites = [Image.open(path).convert("RGBA") for path in found]
        sprites = [sprite.resize((CELL, CELL), Image.Resampling.LANCZOS) if sprite.width > CELL else sprite
                   for sprite in sprites]  # fmt: skip
        names.append(record(label, sprites))
        kept.append(sprites)

    if len({entry["name"] for entry in names}) != len(names):
        raise ValueError("two objects share a name")
    rows = -(-len(names) // COLUMNS)
    for style, column in zip(folders, zip(*kept, strict=True), strict=True):
        sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
        for index, sprite in enumerate(column):
            sheet.paste(sprite, (index % COLUMNS * CELL, index // COLUMNS * CELL))
        # Flat art is small without loss; shaded art is not, and there quality 92 shows no difference.
        lossless = style != "fluent"
        sheet.save(ART / f"{style}.webp", lossless=lossless, quality=100 if lossless else 92, method=6)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in names)
    (ART / "names.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
