#!/usr/bin/env python3
"""Models side by side on held-out data, or proof that an A3 left its decoder's text as it was.

`python jobs/compare.py --model A --model B --data heldout --data ood --output DIR [--names FILE]` writes a page and JSON.
`python jobs/compare.py --text --model A3 [--decoder URI]` exits with 1 at the first token that differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from artemis_vlm.errors import exit_code
from pipelines.compare import CompareConfig, compare, summary
from pipelines.compare_page import PAGE_FILE, write_comparison
from pipelines.unchanged import TextConfig, check_text


def main(arguments: list[str]) -> int:
    return exit_code(lambda: run(arguments))


def run(arguments: list[str]) -> None:
    text = "--text" in arguments
    config = tyro.cli(
        TextConfig if text else CompareConfig,
        prog="compare.py --text" if text else "compare.py",
        description=__doc__,
        args=[argument for argument in arguments if argument != "--text"],
        config=(tyro.conf.UseAppendAction,),
    )
    if isinstance(config, TextConfig):
        print(check_text(config))
        return
    comparison = compare(config)
    write_comparison(comparison)
    print(summary(comparison))
    print(f"\n{config.output.rstrip('/')}/{PAGE_FILE}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
