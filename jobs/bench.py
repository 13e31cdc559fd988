#!/usr/bin/env python3
"""Measure this machine: `data` on one core, `train` and `vllm` on what trains, `serve` and `caption` of a model folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(arguments: list[str]) -> int:
    # argparse: `train` and `vllm` run on a bare GPU machine, with torch, transformers and pyarrow and nothing else of ours
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="samples/s of projector training, beside the limit of the chip")
    train.add_argument("--shapes", choices=("a3", "demo"), default="a3")
    precisions = ("bf16", "fp8-backward", "fp8")
    train.add_argument("--precision", nargs="+", choices=precisions, default=precisions)
    train.add_argument("--baseline", action="store_true", help="also the published recipe, on the same samples")
    train.add_argument("--profile", action="store_true", help="also the parts of a step and its longest kernels")
    train.add_argument("--json", default="", metavar="FILE", help="also write the figures there")
    train.add_argument("--batch-size", type=at_least_one, default=32, help="samples a step")
    train.add_argument("--steps", type=at_least_one, default=8, help="steps that are measured")
    commands.add_parser("serve", help="latency and throughput of a model's server", add_help=False)
    commands.add_parser("caption", help="images/s of captioning, beside one by one and without Ray", add_help=False)
    data = commands.add_parser("data", help="images/s of one core from tar to patches and token ids")
    data.add_argument("--json", default="", metavar="FILE", help="also write the figures there")
    data.add_argument("--images", type=at_least_one, default=400, help="of each size")
    vllm = commands.add_parser(
        "vllm", help="vLLM at full shapes: decoder fed with embeddings, beside one engine with pixels"
    )
    vllm.add_argument("--shapes", choices=("a3", "demo", "tiny"), default="a3")
    vllm.add_argument("--parts", nargs="+", choices=("mono", "separate", "fp8"), default=("mono", "separate"))
    vllm.add_argument("--json", default="", metavar="FILE", help="also write the figures there")
    if arguments[:1] in (["serve"], ["caption"]):
        return measure_model(*arguments)
    args = parser.parse_args(arguments)
    if args.json and not os.access(Path(args.json).absolute().parent, os.W_OK):
        parser.error(f"--json is {args.json}; its folder is not there, or nothing can be written in it")
    if args.command == "vllm":
        from pipelines import bench_vllm

        return bench_vllm.run(bench_vllm.VllmBench.of(args.shapes, args.parts, args.json))
    if args.command == "data":
        from transformers import AutoTokenizer

        from demo import assets
        from pipelines import bench_data

        return bench_data.run(args.images, args.json, AutoTokenizer.from_pretrained(assets.tokenizer()))
    from pipelines import bench_train

    return bench_train.run(
        bench_train.Settings(
            args.shapes, args.precision, args.baseline, args.profile, args.json, args.batch_size, args.steps
        )
    )


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(text)


def measure_model(what: str, *arguments: str) -> int:
    import tyro

    from artemis_vlm.errors import exit_code
    from pipelines import bench_caption, bench_serve

    kind: Any = bench_serve.BenchServe if what == "serve" else bench_caption.CaptionBench
    run: Any = bench_serve.run if what == "serve" else bench_caption.run
    return exit_code(lambda: run(tyro.cli(kind, prog=f"bench.py {what}", args=arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
