#!/usr/bin/env python3
"""Caption images: `ray job submit --working-dir . -- python jobs/caption.py --model URI --input URI --output URI`.

The same command continues a job that was stopped or killed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from artemis_vlm.errors import exit_code
from pipelines.caption import run
from pipelines.caption_stages import CaptionConfig


def main(arguments: list[str]) -> int:
    description = "Caption images, every one once."
    return exit_code(lambda: run(tyro.cli(CaptionConfig, prog="caption.py", description=description, args=arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
