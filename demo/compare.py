"""Compares models on the demo's scenes: held-out pairs of objects in the styles of training, and a style never seen.

    python -m demo.compare runs/demo/a3 [MORE MODELS] [--count 24] [--output runs/compare]

Writes the sets and the names in them under OUTPUT/sets, then does what `jobs/compare.py` does with them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from artemis_vlm.errors import exit_code
from demo import assets
from demo.scenes import DEMO_NAMES, NOUNS
from pipelines.compare import CompareConfig, compare, summary
from pipelines.compare_page import PAGE_FILE, write_comparison

SPLITS = ("heldout", "ood")


def write_sets(folder: Path) -> tuple[list[str], str]:
    """A folder of shards for each split, and a file with the names of the objects in them."""
    for split in SPLITS:
        shutil.copytree(assets.shards(split), folder / split, dirs_exist_ok=True)
    names = folder / "names.txt"
    names.write_text(name_lines(DEMO_NAMES), encoding="utf-8")
    return [str(folder / split) for split in SPLITS], str(names)


def name_lines(names: Sequence[str]) -> str:
    """Objects as `jobs/compare.py --names` reads them: `cat, cats`."""
    return "".join(", ".join(filter(None, (name, NOUNS[name].plural))) + "\n" for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders, projectors, or checkpoints of a run")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--count", type=int, default=24, help=f"scenes of each set, at most {assets.COUNTS['ood']}")
    args = parser.parse_args()
    sets, names = write_sets(args.output / "sets")
    config = CompareConfig(
        model=tuple(args.models), data=tuple(sets), names=names, output=str(args.output), count=args.count
    )
    comparison = compare(config)
    write_comparison(comparison)
    print(f"{summary(comparison)}\n\nopen {args.output / PAGE_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
