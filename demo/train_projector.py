"""Trains the projector that the repo ships: the training loop of `jobs/train_a3.py` on one GPU, all names, fresh scenes.

    python -m demo.train_projector --decoder FOLDER --output DIR --minutes 7

Scenes are made while training, by a process for each core, through JPEG and back as if they came from a shard; none is
seen twice. Without Ray, because the machine it ran on had none. Steps are fixed from the rate of the first few, or by
`--steps`: then two runs see the same scenes, which is how `--frozen-precision fp8` is compared.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from artemis_vlm import chat, graft
from artemis_vlm.packing import Example
from demo.scenes import ALL_NAMES, scene
from pipelines import align
from pipelines.align import Alignment, Step, TrainConfig
from pipelines.data import Encoder, Position, split
from pipelines.shards import RawSample

CONFIG = TrainConfig(batch_size=32, learning_rate=1e-3, warmup=0.05, held_out=256, samples=10**6, micro_tokens=32_768)
PROBE_STEPS = 30
_encoder: Encoder


def start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    torch.set_num_threads(1)


def encode_scene(job: tuple[str, int]) -> Example:
    split_name, index = job
    made = scene(0, index, split=split_name, names=ALL_NAMES)
    out = io.BytesIO()
    made.image.save(out, "JPEG", quality=90)
    candidate = _encoder.candidate(Position(), RawSample(f"{split_name}/{index}", out.getvalue(), made.caption.encode()))
    assert candidate.example is not None, candidate.error
    return candidate.example


class SceneFeed:
    """Steps of fresh scenes, in order."""

    def __init__(self, pool: Any, config: TrainConfig) -> None:
        self.examples: Iterator[Example] = pool.imap(encode_scene, (("train", i) for i in count()), chunksize=16)
        self.config = config

    def next(self, stopping: Callable[[], bool] = align.never) -> Step:
        examples = [next(self.examples) for _ in range(self.config.batch_size)]
        targets, uids = sum(e.n_targets for e in examples), [e.uid for e in examples]
        return Step(split(examples, 1, self.config.micro_tokens)[0], targets, uids, {}, {})


def measured_rate(model: Any, spec: Any, feed: SceneFeed) -> float:
    """Steps a second, once compiled."""
    probe = Alignment(model, spec, CONFIG)
    for _ in range(5):
        probe.train_step(feed.next())
    started = time.perf_counter()
    for _ in range(PROBE_STEPS):
        probe.train_step(feed.next())
    return PROBE_STEPS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, default=Path(__file__).parent / "tower")
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--steps", type=int, default=0, help="0: as many as fit the minutes")
    parser.add_argument("--frozen-precision", choices=("dtype", "fp8"), default="dtype")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sources = graft.Sources(args.tower, args.decoder)
    spec = graft.source_spec(sources, CONFIG.min_pixels, CONFIG.max_pixels)
    tokenizer = graft.load_tokenizer(args.decoder)
    encoder = Encoder(spec, tokenizer, chat.CaptionFrame.build(tokenizer, CONFIG.prompt, False), CONFIG.max_tokens)
    workers = max(1, len(os.sched_getaffinity(0)) - 1)  # one core feeds the GPU
    # Forked before CUDA starts; spawned workers would each import torch anew.
    with multiprocessing.get_context("fork").Pool(workers, start_worker, (encoder,)) as pool:
        held_out = pool.map(encode_scene, [("heldout", i) for i in range(CONFIG.held_out)])
        feed = SceneFeed(pool, CONFIG)
        torch.manual_seed(CONFIG.seed)
        model = graft.load_frozen(sources, torch.bfloat16, args.device)
        fresh = {k: v.clone() for k, v in model.multi_modal_projector.state_dict().items()}
        steps = args.steps or int(args.minutes * 60 * measured_rate(model, spec, feed))
        model.multi_modal_projector.load_state_dict(fresh)
        print(f"torch {torch.__version__}: {steps} steps of {CONFIG.batch_size}", flush=True)
        config = replace(CONFIG, max_steps=steps, save_every=max(1, steps // 4), frozen_precision=args.frozen_precision)
        alignment = Alignment(model, spec, config)
        with (args.output / "metrics.jsonl").open("w", buffering=1) as metrics:

            def on_record(record: dict[str, Any]) -> None:
                if "eval_loss" in record or record["step"] % 50 == 0:
                    metrics.write(json.dumps(record) + "\n")
                    print({k: round(v, 4) for k, v in record.items()}, flush=True)

            def save(_: object) -> None:
                state = {
                    k: v.detach().to("cpu", torch.bfloat16).contiguous()
                    for k, v in model.multi_modal_projector.state_dict().items()
                }
                save_file(state, args.output / graft.PROJECTOR_FILE)

            for _ in align.run(alignment, feed, lambda: held_out, on_record=on_record, save=save):
                pass
        spec.save(args.output)
        pool.terminate()


if __name__ == "__main__":
    main()
