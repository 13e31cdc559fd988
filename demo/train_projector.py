"""Trains the projector that the repo ships: the training loop of `jobs/train_a3.py` on one GPU, all names.

    python -m demo.train_projector --decoder FOLDER --output DIR --painted DIR --scenes 160000 --steps 9000

Scenes are painted first, by a process for each core, through JPEG and back as if they came from a shard: painting while
training would starve the GPU. They stay in `--painted` for the next run. Without Ray, because the machine it ran on had
none. Steps are fixed from the rate of the first few, or by `--steps`: then two runs see the same scenes in the same order,
which is how `--frozen-precision` is compared.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from artemis_vlm import chat, graft
from artemis_vlm.examples import Example
from artemis_vlm.linear import PRECISIONS
from demo.scenes import ALL_NAMES, DEMO_NAMES, scene
from pipelines import align
from pipelines.align import Alignment
from pipelines.data import Encoder, Position, Step, never, split
from pipelines.recipe import TrainConfig
from pipelines.shards import RawSample

CONFIG = TrainConfig(batch_size=128, learning_rate=1e-2, warmup=0.05, held_out=256, samples=10**6, micro_tokens=65_536)
#: Of the images that the projector is used on: Qwen3-VL's own default. In training they stay as small as they are. Two
#: objects of a 128x128 image share sixteen vision tokens, and one of them was often missed (69 % named; enlarged 87 %);
#: trained on enlarged ones too, it met no small ones and named fewer of all (81 % of them, beside 89 %).
USED_MIN_PIXELS = 256 * 256
PROBE_STEPS = 30
FILE_SCENES = 500
_encoder: Encoder


def start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    torch.set_num_threads(1)


def encode_scene(job: tuple[str, int]) -> Example:
    split_name, index = job
    # every other one of the demo's names: what its held-out images show, and a small decoder tells 32 names better than 762
    made = scene(0, index, split=split_name, names=ALL_NAMES if index % 2 else DEMO_NAMES)
    out = io.BytesIO()
    made.image.save(out, "JPEG", quality=90)
    candidate = _encoder.candidate(Position(), RawSample(f"{split_name}/{index}", out.getvalue(), made.caption.encode()))
    assert candidate.example is not None, candidate.error
    return candidate.example


def paint_file(job: tuple[Path, str, range]) -> Path:
    """Some scenes of a split in one file, painted unless it is there."""
    folder, split_name, indices = job
    path = folder / f"{split_name}-{indices.start:07d}-{indices.stop:07d}.safetensors"
    if path.exists():
        return path
    examples = [encode_scene((split_name, index)) for index in indices]
    tensors = {
        "ids": torch.from_numpy(np.concatenate([e.input_ids for e in examples])),
        "patches": torch.from_numpy(np.concatenate([e.patches for e in examples])),
        "sizes": torch.tensor([(len(e.input_ids), e.n_prompt, *e.grid) for e in examples]),
    }
    aside = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, aside)
    aside.rename(path)
    return path


def painted_examples(path: Path) -> Iterator[Example]:
    """What `paint_file` wrote, in order; pixels stay in the file until they are read."""
    tensors = load_file(path)
    ids, patches = tensors["ids"].numpy(), tensors["patches"].numpy()
    at = pixels = 0
    for number, (length, n_prompt, height, width) in enumerate(tensors["sizes"].tolist()):
        area = height * width
        yield Example(
            f"{path.stem}/{number}", ids[at : at + length], n_prompt, patches[pixels : pixels + area], (height, width)
        )
        at, pixels = at + length, pixels + area


def paint(encoder: Encoder, folder: Path, split_name: str, count: int) -> list[Example]:
    """So many scenes of a split, in order. To be called before CUDA starts: its workers are forked."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, split_name, range(i, min(i + FILE_SCENES, count))) for i in range(0, count, FILE_SCENES)]
    # Spawned workers would each import torch anew.
    with multiprocessing.get_context("fork").Pool(None, start_worker, (encoder,)) as pool:
        files = pool.map(paint_file, jobs, chunksize=1)
    return [example for file in files for example in painted_examples(file)]


class MemoryFeed:
    """Steps of examples that are at hand, each epoch in another order."""

    def __init__(self, examples: Sequence[Example], config: TrainConfig) -> None:
        self.examples, self.config = examples, config
        self.waiting: list[int] = []
        self.epoch = 0

    def next(self, stopping: Callable[[], bool] = never) -> Step:
        size = self.config.batch_size
        if len(self.waiting) < size:
            self.waiting = list(range(len(self.examples)))
            random.Random(f"{self.config.seed}/{self.epoch}").shuffle(self.waiting)
            self.epoch += 1
        chosen, self.waiting = [self.examples[i] for i in self.waiting[:size]], self.waiting[size:]
        targets, uids = sum(e.n_targets for e in chosen), [e.uid for e in chosen]
        return Step(split(chosen, 1, self.config.micro_tokens)[0], targets, uids, {}, {})


def measured_rate(model: Any, spec: Any, examples: Sequence[Example], config: TrainConfig) -> float:
    """Steps a second, once compiled; the projector is left as it was."""
    fresh = {k: v.clone() for k, v in model.multi_modal_projector.state_dict().items()}
    probe, feed = Alignment(model, spec, config), MemoryFeed(examples, config)
    for _ in range(5):
        probe.train_step(feed.next())
    started = time.perf_counter()
    for _ in range(PROBE_STEPS):
        probe.train_step(feed.next())
    model.multi_modal_projector.load_state_dict(fresh)
    return PROBE_STEPS / (time.perf_counter() - started)


def train(alignment: Alignment, examples: Sequence[Example], held_out: Sequence[Example], output: Path) -> None:
    """Every step; leaves `metrics.jsonl`, the projector in bfloat16 and the pixel format in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    projector = alignment.model.multi_modal_projector

    def save(_: object) -> None:
        state = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in projector.state_dict().items()}
        save_file(state, output / graft.PROJECTOR_FILE)

    with (output / "metrics.jsonl").open("w", buffering=1) as metrics:

        def on_record(record: dict[str, Any]) -> None:
            if "eval_loss" in record or record["step"] % 50 == 0:
                metrics.write(json.dumps(record) + "\n")
            if "eval_loss" in record or record["step"] % 500 == 0:
                print({k: round(v, 4) for k, v in record.items()}, flush=True)

        feed = MemoryFeed(examples, alignment.config)
        for _ in align.run(alignment, feed, lambda: held_out, on_record=on_record, save=save):
            pass
    replace(alignment.spec, min_pixels=USED_MIN_PIXELS).save(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, default=Path(__file__).parent / "tower")
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--projector", type=Path, help="folder of a trained one to go on from; else a new one")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--painted", type=Path, required=True, help="folder of painted scenes; filled where they are missing"
    )
    parser.add_argument("--scenes", type=int, default=160_000)
    parser.add_argument("--minutes", type=float, default=7.0, help="of training, once the scenes are painted")
    parser.add_argument("--steps", type=int, default=0, help="0: as many as fit the minutes")
    parser.add_argument("--batch-size", type=int, default=CONFIG.batch_size)
    parser.add_argument("--learning-rate", type=float, default=CONFIG.learning_rate)
    parser.add_argument("--seed", type=int, default=CONFIG.seed)
    parser.add_argument("--frozen-precision", choices=tuple(PRECISIONS), default="dtype")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    sources = graft.Sources(args.tower, args.decoder)
    spec = graft.source_spec(sources, CONFIG.min_pixels, CONFIG.max_pixels)
    tokenizer = graft.load_tokenizer(args.decoder)
    encoder = Encoder(spec, tokenizer, chat.CaptionFrame.build(tokenizer, CONFIG.prompt, False), CONFIG.max_tokens)
    started = time.perf_counter()
    held_out, scenes = (
        paint(encoder, args.painted, *what) for what in (("heldout", CONFIG.held_out), ("train", args.scenes))
    )
    print(f"{len(scenes)} scenes in {time.perf_counter() - started:.0f} s", flush=True)
    torch.manual_seed(args.seed)
    trained = graft.read_projector(args.projector) if args.projector else None
    model = graft.load_frozen(sources, torch.bfloat16, args.device, trained)
    config = replace(
        CONFIG,
        seed=args.seed,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        frozen_precision=args.frozen_precision,
        max_steps=args.steps,
    )
    if not args.steps:
        rate = measured_rate(model, spec, scenes, config)
        config = replace(config, max_steps=int(args.minutes * 60 * rate))
    config = replace(config, save_every=max(1, config.steps // 16))
    print(f"torch {torch.__version__}: {config.steps} steps of {config.batch_size}", flush=True)
    train(Alignment(model, spec, config), scenes, held_out, args.output)


if __name__ == "__main__":
    main()
