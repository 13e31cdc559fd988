"""The training loop in processes that can be killed anywhere: real shards, order, encoding and files; no Ray.

Run as a program it has everything imported, and forks a run for each line that it reads, so that one costs no start.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.tensorboard
from models import tiny_a3
from samples import caption_encoder, jpeg, sample, write_tar
from transformers import AutoTokenizer

from artemis_vlm import RunError, graft
from pipelines import align, data
from pipelines.align import Alignment
from pipelines.checkpoint import CheckpointStore
from pipelines.data import Counts, Step, never, position_from, position_json
from pipelines.desk import Desk, claim, earlier_run
from pipelines.inputs import Data, Parts
from pipelines.recipe import TrainConfig
from pipelines.shards import RawSample
from pipelines.storage import RunFolder


class Folded(data.Encoder):
    """The real encoding, its tokens folded into the tiny model's vocabulary; control tokens stay."""

    def candidates(self, samples: Sequence[tuple[data.Position, RawSample]]) -> Iterator[data.Candidate]:
        for candidate in super().candidates(samples):
            if example := candidate.example:
                ids = np.where(example.input_ids < 64, example.input_ids, 64 + example.input_ids % 236)
                candidate = replace(candidate, example=replace(example, input_ids=ids.astype(np.int32)))
            yield candidate


def write_data(folder: Path) -> Path:
    """Six shards of twelve samples, every ninth or so of which is bad, and one shard cut off."""
    folder.mkdir()
    bad = [{"jpg": jpeg(1, 300, 300)[:900], "txt": "a"}, {"jpg": jpeg(), "txt": b"\xff\xfe"}, {"txt": "alone"}]
    for shard in range(6):
        samples = [sample(n) for n in range(shard * 12, shard * 12 + 12)]
        samples[shard * 2] = (samples[shard * 2][0], bad[shard % 3])
        write_tar(folder / f"sa_{shard:06d}.tar", samples)
    last = folder / "sa_000005.tar"
    last.write_bytes(last.read_bytes()[:20_000])
    return folder


def config(output: Path, data: Path | str, **fields: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "tower": "tiny",
            "decoder": "tiny",
            "data": str(data),
            "output": str(output),
            "samples": 70,
            "held_out": 5,
            "batch_size": 4,
            "max_steps": 20,
            "learning_rate": 1e-2,
            "dtype": "float32",
            "save_every": 3,
            "eval_every": 7,
            "captions": 0,
            "max_tokens": 256,
            "micro_tokens": 90,
            "max_bad_share": 1.0,
            "threads": 1,
        }
        | fields
    )


class Feed:
    """The stream of this process; leaves the sample ids of each step beside the run."""

    def __init__(self, config: TrainConfig, source: data.Source, encoder: data.Encoder, state: dict[str, Any]) -> None:
        stream = data.candidates(source, encoder, position_from(state["position"]))
        self.batches = data.batches(stream, config.batch_size, Counts(**state["counts"]), config.max_bad_share)
        self.micro_tokens = state["micro_tokens"]
        self.ids = Path(config.output, "ids.jsonl")

    def next(self, stopping: Callable[[], bool] = never) -> Step:
        batch = next(self.batches)
        uids = [e.uid for e in batch.examples]
        with self.ids.open("a") as ids:
            ids.write(json.dumps([batch.counts.used // len(uids), uids]) + "\n")
        (share,) = data.split(batch.examples, 1, self.micro_tokens)
        n_targets = sum(e.n_targets for e in batch.examples)
        return Step(share, n_targets, uids, position_json(batch.position), asdict(batch.counts), batch.quarantined)


def encoder_of(tokenizer: Path) -> Folded:
    encoder = caption_encoder(AutoTokenizer.from_pretrained(tokenizer))
    return Folded(encoder.spec, encoder.tokenizer, encoder.frame, encoder.max_tokens)


def train(
    config: TrainConfig, encoder: data.Encoder, stopping: Callable[[], bool] = never, parts: Parts | None = None
) -> Alignment:
    """What `pipelines.train` does on one rank; without parts with a tiny model in place of a loaded one."""
    if parts:
        torch.manual_seed(config.seed)
        model = graft.load_frozen(parts.sources, config.torch_dtype(torch.device("cpu")))
    else:
        model = tiny_a3()
        model.set_training_stage("stage1")
        parts = Parts(graft.Sources(Path("tower"), Path("decoder")), encoder.spec, encoder.tokenizer, encoder.frame)
    output = RunFolder(config.output)
    began_with = earlier_run(output, config)
    source = data.find_source(config.data, config.seed, config.held_out, began_with["held_out"] if began_with else None)
    found = Data(source, source.shards)
    owner = str(os.getpid())
    claim(output, config, parts, found, owner)
    held_out = data.first_examples(found.evaluated, encoder, config.held_out)
    alignment = Alignment(model, encoder.spec, config, found.identity())
    store = CheckpointStore(f"{config.output}/checkpoints", config.keep)
    if newest := store.newest():
        alignment.restore(newest)
    feed = Feed(config, source, encoder, alignment.state)
    desk = Desk(config, parts, alignment, store, list, owner=owner, on_saved=lambda: None, on_error=lambda: None)
    try:
        for _ in align.run(alignment, feed, lambda: held_out, on_record=desk.record, save=desk.save, stopping=stopping):
            pass
    finally:
        desk.close()
    return alignment


# --- what a run leaves -----------------------------------------------------------------------------------------------

EXACT = ("step", "loss", "eval_loss", "grad_norm", "lr", "seen", "used", "quarantined", "skipped")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def result(output: Path) -> dict[str, Any]:
    """All of a run that must not depend on what happened to it, to the last bit."""
    ids: dict[int, list[str]] = {}
    for step, uids in lines(output / "ids.jsonl"):
        assert ids.setdefault(step, uids) == uids, f"step {step} was given other samples the second time"
    store = CheckpointStore(str(output / "checkpoints"))
    last = store.read(store.steps()[-1])
    state = {k: v for k, v in last.state.items() if k != "run"}
    tensors = {f"{stem}/{k}": v.numpy().tobytes() for stem, part in last.tensors.items() for k, v in part.items()}
    metrics = [{k: record[k] for k in EXACT if k in record} for record in lines(output / "metrics.jsonl")]
    return {"ids": ids, "state": state, "tensors": tensors, "metrics": metrics} | {
        "quarantine": lines(output / "quarantine.jsonl"),
    }


# --- runs to kill ----------------------------------------------------------------------------------------------------


class Runs:
    """Starts runs in a forking process of its own."""

    def __init__(self, tokenizer: Path) -> None:
        command = [sys.executable, __file__, str(tokenizer)]
        here = Path(__file__).parent
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent}:{here}"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, config: TrainConfig, *, kill_after: float | None = None, **how: Any) -> int:
        """A run to its end, or to its kill; returns the exit status, negative for a signal.

        Args:
            kill_after: seconds until it is killed from outside.
            how: `save_call`: the call of a save, counted over the run, at which it kills itself.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"config": asdict(config), **how}) + "\n")
        self.process.stdin.flush()
        pid = int(self._line())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # a child stays until its parent has been told to take it
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        self.process.communicate(timeout=10)


@contextmanager
def runs(tokenizer: Path) -> Iterator[Runs]:
    started = Runs(tokenizer)
    try:
        yield started
    finally:
        started.close()


#: Calls that a save makes on the disk, by where they are found.
SAVE_CALLS = ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "replace"), (shutil, "rmtree"))


def die_at(call: int) -> None:
    """Kills this process at its n-th disk call of a save; half of a file that was to be synced may be lost with it."""
    left = call

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                synced = Path(f"/proc/self/fd/{args[0]}").resolve() if function.__name__ == "fsync" else Path()
                if synced.parent.name.startswith(".writing-") and call % 2:
                    os.truncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    for place, name in SAVE_CALLS:
        setattr(place, name, deadly(getattr(place, name)))


def serve(tokenizer_folder: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("pipelines").setLevel(logging.ERROR)  # hundreds of runs would warn of one damaged image
    encoder = encoder_of(Path(tokenizer_folder))
    print("ready", flush=True)
    while order := sys.stdin.readline():
        job = json.loads(order)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _child(job, encoder)
        print(pid, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(job: dict[str, Any], encoder: data.Encoder) -> None:
    code = 1
    try:
        if "save_call" in job:
            _inside_saves(job["save_call"])
        if "file_limit" in job:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        train(TrainConfig(**job["config"]), encoder)
        code = 0
    except RunError as error:
        Path(job["config"]["output"], "error.txt").write_text(str(error))
        code = 3
    finally:
        if code == 1:
            import traceback

            traceback.print_exc()
        os._exit(code)


def _inside_saves(call: int) -> None:
    """Counts only what happens between the start and the end of a checkpoint's write."""
    write = CheckpointStore.write
    armed = False

    def counted(self: CheckpointStore, *args: Any) -> None:
        nonlocal armed
        if not armed:
            armed = True
            die_at(call)
        write(self, *args)

    CheckpointStore.write = counted  # type: ignore[method-assign]


def kill_points(seed: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Where to kill, endlessly: in turns a time of a run of so many seconds, and a call inside a save."""
    rng = random.Random(seed)
    while True:
        yield {"kill_after": rng.uniform(0.02, 0.9) * seconds}
        yield {"save_call": rng.randint(1, 60)}


if __name__ == "__main__":
    serve(sys.argv[1])
