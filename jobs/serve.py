#!/usr/bin/env python3
"""Serve an A3: `ray job submit --working-dir . -- python jobs/serve.py --model URI [--field value ...]`.

Runs until it is stopped, and then lets requests that run come to their end.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from artemis_vlm.errors import exit_code
from pipelines.serve import run
from pipelines.stages import ServeConfig


def main(arguments: list[str]) -> int:
    description = "Serve an A3 behind OpenAI's chat API."
    return exit_code(lambda: run(tyro.cli(ServeConfig, prog="serve.py", description=description, args=arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
