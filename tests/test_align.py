"""The training loop and its checkpoints: exact resume, ranks, damage, numbers going wrong. Without Ray."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from models import SPEC, random_example, tiny_a3

from artemis_vlm import CheckpointError, RunError
from artemis_vlm.examples import Example
from pipelines import align
from pipelines.align import Alignment
from pipelines.checkpoint import BackgroundWriter, Checkpoint, CheckpointStore
from pipelines.data import DataEnded, Step, never, split
from pipelines.recipe import A3, A3_PREVIEW, AT_LEAST_ZERO, DEMO, EVAL_SHARES, TrainConfig, learning_rate

CONFIG = TrainConfig(samples=49, held_out=1, batch_size=8, dtype="float32", save_every=1, learning_rate=1e-2)


def step_examples(step: int) -> list[Example]:
    rng = np.random.default_rng(step)
    grids = [(2, 2), (4, 6), (0, 0), (2, 8)]
    return [random_example(rng, f"s{step}/{i}", grids[int(rng.integers(4))], 3, int(rng.integers(2, 9))) for i in range(8)]


class Examples:
    """A feed whose step n is a pure function of n, dealt to one rank."""

    def __init__(self, start: int, rank: int = 0, world: int = 1, micro_tokens: int = 60) -> None:
        self.step, self.rank, self.world, self.micro_tokens = start, rank, world, micro_tokens

    def next(self, stopping: Callable[[], bool] = never) -> Step:
        examples = step_examples(self.step)
        self.step += 1
        share = split(examples, self.world, self.micro_tokens)[self.rank]
        n_targets, uids = sum(e.n_targets for e in examples), [e.uid for e in examples]
        counts = {"seen": self.step * 8, "used": self.step * 8, "quarantined": 0}
        return Step(share, n_targets, uids, {"epoch": 0, "shard": 0, "row": self.step * 8}, counts)


def start(config: TrainConfig = CONFIG) -> Alignment:
    model = tiny_a3()
    model.set_training_stage("stage1")
    return Alignment(model, SPEC, config)


def train(alignment: Alignment, feed: Any, until: int, store: CheckpointStore | None = None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    save = store.write if store else lambda _: None
    for step in align.run(alignment, feed, lambda: step_examples(1000), on_record=records.append, save=save):
        if step == until:
            break
    return records


def weights(alignment: Alignment) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in alignment.model.multi_modal_projector.state_dict().items()}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def test_named_runs_have_the_published_steps() -> None:
    assert (A3.steps, A3_PREVIEW.steps, DEMO.steps) == (31_219, 3_094, 304)
    assert {0, 1560, 6240, 15600, 23400, 28080, 31219} <= A3.eval_steps
    assert [round(share * DEMO.steps) for share in EVAL_SHARES] == sorted(DEMO.eval_steps)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"held_out": 49}, "something must be left to train on"),
        ({"workers": 9}, "9 workers share a step of 8 samples"),
        ({"dtype": "float16"}, "expected bfloat16, float32 or auto"),
        ({"worker_label": "gb10"}, "expected key=value"),
        ({"frozen_precision": "int4"}, "expected dtype, fp8, fp8-backward"),
        ({"micro_tokens": -1}, "or 0 for what fits the memory"),
        ({"min_pixels": 0}, "min_pixels is 0; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a finite number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan; expected a finite number above 0"),
        ({"weight_decay": math.inf}, "weight_decay is inf; expected a finite number of at least 0"),
        ({"warmup": math.nan}, "warmup is nan"),
        *(({name: -1}, f"{name} is -1; expected a finite number of at least 0") for name in AT_LEAST_ZERO),
    ],
)
def test_bad_configurations_are_sentences(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RunError, match=says):
        replace(CONFIG, **change)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    config = replace(CONFIG, max_steps=100, warmup=0.05)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[4] == max(rates) == config.learning_rate
    assert rates[0] == pytest.approx(config.learning_rate / 5)
    assert rates[99] < 1e-3 * config.learning_rate


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    whole = start()
    records = train(whole, Examples(0), 6)
    for stop in (1, 3, 5):
        store = CheckpointStore(str(tmp_path / str(stop)))
        first = train(start(), Examples(0), stop, store)
        again = start()
        checkpoint = store.newest()
        assert checkpoint is not None
        assert checkpoint.state["position"] == {"epoch": 0, "shard": 0, "row": stop * 8}
        again.restore(checkpoint)
        second = train(again, Examples(checkpoint.step), 6, store)
        losses = [r["loss"] for r in first + second if "loss" in r]
        assert losses == [r["loss"] for r in records if "loss" in r]
        assert all(torch.equal(v, weights(again)[k]) for k, v in weights(whole).items())


def test_an_fp8_run_continues_with_the_directions_it_had(tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=60, frozen_precision="fp8")
    assert config.aim_steps == 3
    store = CheckpointStore(str(tmp_path), keep=10)
    losses = [r["loss"] for r in train(start(config), Examples(0), 6, store) if "loss" in r]
    found = [store.read(step).tensors["directions"] for step in (1, 2, 4)]
    assert all(torch.equal(v, found[1][k]) and v.any() for k, v in found[0].items())
    assert not any(torch.equal(v, found[2][k]) for k, v in found[0].items() if not k.startswith("0."))
    for begins in (2, 3, 4):
        continued = start(config)
        checkpoint = store.read(begins)
        continued.restore(checkpoint)
        assert [r["loss"] for r in train(continued, Examples(begins), 6) if "loss" in r] == losses[begins:]
    without = start(config)
    without.restore(replace(checkpoint, tensors={k: v for k, v in checkpoint.tensors.items() if k != "directions"}))
    assert train(without, Examples(begins), 6)[0]["loss"] != losses[begins]


def test_samples_that_give_no_directions_leave_the_former_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alignment = start(replace(CONFIG, frozen_precision="fp8"))
    alignment.train_step(Examples(0).next())
    before = {k: v.clone() for k, v in alignment.packed.directions.items()}
    monkeypatch.setattr(alignment.packed, "find_directions", lambda batch: {k: v * math.nan for k, v in before.items()})
    alignment.train_step(Examples(1).next())
    assert all(torch.equal(v, before[k]) for k, v in alignment.packed.directions.items())
    assert "step 1: its samples give no finite directions" in caplog.text


def test_micro_batches_do_not_change_the_loss() -> None:
    records = [train(start(), Examples(0, micro_tokens=n), 6) for n in (20, 60, 10_000)]
    for other in records[1:]:
        for ours, theirs in zip(records[0], other):
            for name in ("loss", "eval_loss", "grad_norm"):
                if name in ours:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_micro_tokens_are_decided_once_and_a_flag_overrides(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    first = start()
    assert first.state["micro_tokens"] == align.CPU_MICRO_TOKENS
    first.state["micro_tokens"] = 77
    train(first, Examples(0), 1, store)
    checkpoint = store.read(1)
    again = start()
    again.packed.set_compiled(True)
    assert not again.packed.compile_it, "a CPU compiles nothing"
    again.packed.compile_it = again.packed.tower.compile_it = True
    again.restore(checkpoint)
    assert again.state["micro_tokens"] == 77
    assert not again.packed.compile_it, "compiled or not as the run began"
    assert not again.packed.tower.compile_it
    told = start(replace(CONFIG, micro_tokens=99))
    told.restore(checkpoint)
    assert told.state["micro_tokens"] == 99


def test_an_evaluation_that_is_not_finite_ends_the_run() -> None:
    """No later one would be better than a NaN, nor worse."""
    broken = start()
    with torch.no_grad():
        broken.model.language_model.lm_head.weight[5] = torch.nan
    with pytest.raises(RunError, match="the evaluation at step 0 gave a loss of nan: a frozen weight is not finite"):
        train(broken, Examples(0), 2)
    assert broken.state["best"] is None
    assert broken.evaluation_due


def test_the_next_step_is_loaded_while_this_one_runs_and_cannot_take_it_along() -> None:
    class Ending(Examples):
        def next(self, stopping: Callable[[], bool] = never) -> Step:
            if self.step == 2:
                raise DataEnded("the data ended", [])
            return super().next()

    feed, records = Ending(0), list[dict[str, Any]]()
    steps = align.run(start(), feed, lambda: step_examples(1000), on_record=records.append, save=lambda _: None)
    assert next(steps) == 1
    assert feed.step == 2
    assert next(steps) == 2
    with pytest.raises(DataEnded):
        next(steps)
    assert [r["step"] for r in records if "loss" in r] == [1, 2]


def run_rank(rank: int, folder: str, told_at: int | None, config: TrainConfig) -> None:
    """One of two ranks; rank 1 alone is told to stop, within the step after `told_at`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    reductions = 0
    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal reductions
        reductions += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    alignment = start(config)
    records: list[dict[str, Any]] = []
    store = CheckpointStore(f"{folder}/checkpoints")
    for _ in align.run(
        alignment,
        Examples(0, rank, 2),
        lambda: step_examples(1000)[rank::2],
        on_record=records.append,
        save=store.write if rank == 0 else lambda _: None,
        stopping=lambda: rank == 1 and told_at is not None and alignment.step >= told_at,
    ):
        pass
    evaluations = sum("eval_loss" in r for r in records)
    found = {"records": records, "reductions": reductions - evaluations, "step": alignment.step}
    found["directions"] = {k: v.float().tolist() for k, v in alignment.packed.directions.items()}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def two_ranks(folder: Path, told_at: int | None = None, config: TrainConfig = CONFIG) -> list[Any]:
    torch.multiprocessing.start_processes(run_rank, (str(folder), told_at, config), nprocs=2, start_method="spawn")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_give_the_curve_of_one(tmp_path: Path) -> None:
    single = train(start(), Examples(0), 6)
    for found in two_ranks(tmp_path):
        assert found["reductions"] == CONFIG.steps, "one all-reduce a step"
        for ours, theirs in zip(found["records"], single, strict=True):
            for name in ("loss", "eval_loss"):
                if name in theirs:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_two_ranks_in_fp8_compute_in_the_same_directions(tmp_path: Path) -> None:
    config = replace(CONFIG, frozen_precision="fp8")
    single = [r["loss"] for r in train(start(config), Examples(0), 6) if "loss" in r]
    first, second = two_ranks(tmp_path, config=config)
    assert first["directions"] == second["directions"]
    assert any(map(any, first["directions"]["0.out"]))
    assert [r["loss"] for r in first["records"] if "loss" in r] == pytest.approx(single, rel=1e-2)


def test_all_ranks_abandon_a_step_when_one_is_told_and_one_worker_goes_on(tmp_path: Path) -> None:
    single = train(start(), Examples(0), 6)
    first, second = two_ranks(tmp_path, told_at=3)
    assert first["step"] == second["step"] == 3
    again = start()
    checkpoint = CheckpointStore(f"{tmp_path}/checkpoints").newest()
    assert checkpoint is not None
    assert checkpoint.step == 3
    again.restore(checkpoint)
    losses = [r["loss"] for r in first["records"] + train(again, Examples(3), 6) if "loss" in r]
    assert losses == pytest.approx([r["loss"] for r in single if "loss" in r], rel=1e-5)


@pytest.mark.parametrize("asked", range(1, 40, 6))
def test_told_at_any_micro_batch_it_leaves_what_an_uninterrupted_run_had(tmp_path: Path, asked: int) -> None:
    """Within a step, within an evaluation, and between them."""
    whole = train(start(), Examples(0, micro_tokens=20), 6)
    store = CheckpointStore(str(tmp_path))
    left = asked

    def stopping() -> bool:
        nonlocal left
        left -= 1
        return left <= 0

    records: list[dict[str, Any]] = []
    stopped = start(replace(CONFIG, save_every=4, micro_tokens=40))
    for _ in align.run(
        stopped,
        Examples(0, micro_tokens=20),
        lambda: step_examples(1000),
        on_record=records.append,
        save=store.write,
        stopping=stopping,
    ):
        pass
    again = start(replace(CONFIG, micro_tokens=40))
    if checkpoint := store.newest():
        assert checkpoint.step == stopped.step
        again.restore(checkpoint)
    else:
        assert stopped.step == 0
    records = [r for r in records if r["step"] <= again.step - again.evaluation_due]  # as desk.py continues the file
    records += train(again, Examples(again.step, micro_tokens=20), 6)
    exact = ("step", "loss", "grad_norm")
    assert [[r.get(k) for k in exact] for r in records] == [[r.get(k) for k in exact] for r in whole]
    assert ["eval_loss" in r for r in records] == ["eval_loss" in r for r in whole]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    """Which one is best depends on what is held out: here, samples like those of the second step."""
    store = CheckpointStore(str(tmp_path), keep=1)
    alignment = start(replace(CONFIG, eval_every=1, learning_rate=0.05, warmup=0.0))
    records: list[dict[str, Any]] = []

    def save(checkpoint: Checkpoint) -> None:
        store.write(checkpoint, alignment.best_step)

    for _ in align.run(alignment, Examples(0), lambda: step_examples(1), on_record=records.append, save=save):
        pass
    losses = {r["step"]: r["eval_loss"] for r in records}
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < 6
    assert store.steps() == [best, 6]
    newest = store.newest()
    assert newest is not None
    assert newest.state["best"] == [losses[best], best]


def test_non_finite_steps_update_nothing_and_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    alignment = start()
    before = weights(alignment)
    with torch.no_grad():
        alignment.model.language_model.lm_head.weight[5, 0] = math.nan
    feed = Examples(0)
    with caplog.at_level(logging.WARNING):
        for _ in range(align.MAX_SKIPPED_STEPS - 1):
            alignment.train_step(feed.next())
    assert "s0/0" in caplog.text
    assert alignment.state["skipped"] == 2
    with pytest.raises(RunError, match=r"3 steps in a row .* s2/0, .*s2/7; look at them"):
        alignment.train_step(feed.next())
    assert all(torch.equal(v, weights(alignment)[k]) for k, v in before.items())


# --- checkpoints -----------------------------------------------------------------------------------------------------


def made(step: int) -> Checkpoint:
    tensors = {"projector": {"w": torch.full((3, 3), float(step))}, "optimizer": {"w.exp_avg": torch.ones(3, 3)}}
    return Checkpoint(step, tensors, {"position": {"epoch": 0}}, {"preprocessor_config.json": b"{}"})


def test_checkpoints_round_trip_and_old_ones_go(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=2)
    for step in (1, 2, 3, 4):
        store.write(made(step), best_step=1)
    assert store.steps() == [1, 3, 4]
    newest = store.newest()
    assert newest is not None
    assert newest.step == 4
    assert torch.equal(newest.tensors["projector"]["w"], torch.full((3, 3), 4.0))
    assert newest.files == {"preprocessor_config.json": b"{}"}


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "checksums", "empty"])
@pytest.mark.parametrize("file", ["projector.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, damage: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path))
    store.write(made(1))
    store.write(made(2))
    path = tmp_path / "step_00000002" / file
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        path.unlink()
    elif damage == "checksums":
        (path.parent / "checksums.json").write_bytes(b"{")
    else:
        path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    assert "step_00000002" in caplog.text
    with pytest.raises(CheckpointError, match="step_00000002"):
        store.read(2)
    store.write(made(2))
    assert store.read(2).step == 2, "the damaged one is written again"


def test_a_save_that_dies_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(str(tmp_path))
    store.write(made(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match=r"step_00000002 could not be written to .*: .*No space .* make room"):
            store.write(made(2))
    newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    store.write(made(2))
    assert not list(tmp_path.glob(".writing-*"))


def test_the_background_writers_errors_reach_the_caller() -> None:
    writer = BackgroundWriter()

    def fail() -> None:
        raise OSError("disk full")

    writer.submit(fail)
    with pytest.raises(OSError, match="disk full"):
        writer.close()


def test_of_two_failed_writes_the_first_is_told() -> None:
    """The second waits already when the first fails, so the caller cannot be told before it fails as well."""
    second_waits = threading.Event()
    told: list[str] = []
    writer = BackgroundWriter(lambda: told.append("stop"))

    def first() -> None:
        second_waits.wait(60)
        raise OSError("the first")

    def second() -> None:
        raise OSError("the second")

    writer.submit(first)
    writer.submit(second)
    second_waits.set()
    with pytest.raises(OSError, match="the first"):
        writer.close()
    assert told == ["stop", "stop"]
