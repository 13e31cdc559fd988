#!/usr/bin/env python3
"""Align a projector: `ray job submit --working-dir . -- python jobs/train_a3.py [demo|a3|a3-preview] [--field value ...]`.

Without arguments it trains the embedded demo. The same command continues an unfinished run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from artemis_vlm.errors import exit_code
from pipelines import report
from pipelines.recipe import A3, A3_PREVIEW, DEMO, TrainConfig
from pipelines.train import fit

RUNS = {
    "demo": ("The embedded demo: minutes on two cores, no downloads.", DEMO),
    "a3": ("The published A3: 1,000,000 samples, 31,219 steps.", A3),
    "a3-preview": ("The published A3-preview: 25,000 samples, 3,094 steps.", A3_PREVIEW),
}


def main(arguments: list[str]) -> int:
    return exit_code(lambda: train(arguments))


def train(arguments: list[str]) -> None:
    if not arguments or (arguments[0].startswith("--") and arguments[0] not in ("-h", "--help")):
        arguments = ["demo", *arguments]
    config: TrainConfig = tyro.extras.overridable_config_cli(
        RUNS,
        prog="train_a3.py",
        description="Align a projector between a frozen tower and a frozen decoder.",
        args=arguments,
    )
    if arguments[0] == "demo":  # here, since only the demo needs what `[demo]` installs
        from demo import assets

        config = assets.fill_in(config)
    print(report.summary(fit(config), config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
