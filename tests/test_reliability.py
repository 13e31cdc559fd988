"""Runs that are killed, damaged and misled, without Ray: what they leave equals a run that nothing happened to."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import logging
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bare
import numpy as np
import pytest
import torch
from models import random_example
from samples import sample, write_tar

from artemis_vlm import CheckpointError, RunError, graft
from demo import assets
from pipelines import align, data, train
from pipelines.checkpoint import Checkpoint, CheckpointStore
from pipelines.data import Candidate, Counts, DataEnded, Position
from pipelines.desk import check_owner, claim, earlier_run
from pipelines.inputs import Data, anchored, find_data, find_parts
from pipelines.recipe import TrainConfig
from pipelines.shards import Shard, check_same_data, identity, open_rows
from pipelines.storage import RunFolder

KILLS = 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare.write_data(tmp_path_factory.mktemp("bare") / "shards")


@pytest.fixture(scope="module")
def runs() -> Iterator[bare.Runs]:
    with bare.runs(assets.tokenizer()) as started:
        yield started


@pytest.fixture(scope="module")
def whole(runs: bare.Runs, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The output of a run that nothing happened to, and the seconds it took."""
    output = tmp_path_factory.mktemp("whole")
    started = time.monotonic()
    assert runs.run(bare.config(output, shards)) == 0
    return output, time.monotonic() - started


# --- kills -----------------------------------------------------------------------------------------------------------


def test_killed_at_any_point_it_ends_the_same_to_the_bit(
    runs: bare.Runs, shards: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    expected = bare.result(whole[0])
    assert expected["metrics"][-1]["seen"] == expected["metrics"][-1]["used"] + len(expected["quarantine"])
    killed: Counter[str] = Counter()
    for number, point in enumerate(bare.kill_points(0, whole[1])):
        output = tmp_path / str(number)
        config = bare.config(output, shards)
        if runs.run(config, **point) == -9:
            killed[next(iter(point))] += 1
        assert runs.run(config) == 0, point
        assert bare.result(output) == expected, point
        if killed.total() == KILLS:
            break
    assert killed["save_call"] >= 5
    print(f"\n{killed.total()} kills, {killed['save_call']} of them inside a save: the same bits after each")


def test_killed_again_and_again_it_gets_on(runs: bare.Runs, shards: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    config = bare.config(tmp_path, shards, save_every=2)
    kills = 0
    for call in itertools.cycle([9, 17, 12]):
        if runs.run(config, save_call=call) == 0:
            break
        kills += 1
    assert kills >= 5
    found, expected = bare.result(tmp_path), bare.result(whole[0])
    assert {k: v for k, v in found.items() if k != "state"} == {k: v for k, v in expected.items() if k != "state"}


# --- damages ---------------------------------------------------------------------------------------------------------


def made(step: int) -> Checkpoint:
    tensors = {"projector": {"w": torch.full((30, 3), float(step))}, "optimizer": {"w.exp_avg": torch.ones(30, 3)}}
    return Checkpoint(step, tensors, {"position": {"epoch": 0}}, {"preprocessor_config.json": b'{"min_pixels": 1}'})


FILES = ("projector.safetensors", "optimizer.safetensors", "state.json", "preprocessor_config.json", "checksums.json")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "first half": lambda data: data[: len(data) // 2],
    "last byte lost": lambda data: data[:-3],
    "first bit flipped": lambda data: flipped(data, 0),
    "middle bit flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"\0" * 512,
}


def test_damages_are_named_and_the_newest_whole_checkpoint_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    count = 0
    for (damage, change), file in itertools.product(DAMAGES.items(), FILES):
        root = tmp_path / f"{damage}-{file}"
        store = CheckpointStore(str(root))
        store.write(made(1))
        store.write(made(2))
        path = root / "step_00000002" / file
        changed = change(path.read_bytes())
        path.unlink() if changed is None else path.write_bytes(changed)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            newest = store.newest()
        assert newest is not None
        assert newest.step == 1, (damage, file)
        named = file if damage != "middle bit flipped" else ""  # of the checksums: the file that no longer fits is named
        assert "step_00000002" in caplog.text, (damage, file)
        assert named in caplog.text, (damage, file, caplog.text)
        store.write(made(2))
        assert store.read(2).step == 2
        count += 1
    print(f"\n{count} damages named and passed over")
    assert count == 40


@pytest.mark.parametrize("call", range(10))
def test_a_full_disk_costs_only_the_checkpoint_it_meets(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full at each call that a save makes."""
    store = CheckpointStore(str(tmp_path), keep=1)
    store.write(made(1))
    left = call

    def full(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        for place, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir")):
            patch.setattr(place, name, full(getattr(place, name)))
        with pytest.raises(RunError, match=r"step_00000002 could not be written to .*No space left on device; earlier ones"):
            store.write(made(2))
    newest = store.newest()
    assert newest is not None
    assert newest.step == (2 if call == 9 else 1), "renamed, and not yet synced: whole all the same"
    store.write(made(3))
    assert store.steps() == [3]
    assert not list(tmp_path.glob(".writing-*"))


def test_a_disk_that_fills_up_stops_the_run_with_a_sentence_and_room_continues_it(
    runs: bare.Runs, shards: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    config = bare.config(tmp_path, shards)
    assert runs.run(config, file_limit=20_000) == 3
    says = (tmp_path / "error.txt").read_text()
    assert "the checkpoint step_00000001 could not be written" in says
    assert "File too large" in says
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert runs.run(config) == 0
    assert bare.result(tmp_path) == bare.result(whole[0])


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(
    runs: bare.Runs, shards: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    rng = random.Random(1)
    for number, damage in enumerate(("first half", "middle bit flipped", "missing")):
        output = tmp_path / str(number)
        shutil.copytree(whole[0], output)
        config = bare.config(output, shards)
        newest = sorted((output / "checkpoints").iterdir())[-1]
        path = newest / rng.choice(FILES)
        changed = DAMAGES[damage](path.read_bytes())
        path.unlink() if changed is None else path.write_bytes(changed)
        metrics = output / "metrics.jsonl"
        metrics.write_text(metrics.read_text() + '{"step": 21, "lo')  # and its process died in a line
        assert runs.run(config) == 0
        assert bare.result(output) == bare.result(whole[0])


# --- the same run, or another ----------------------------------------------------------------------------------------


def claimed(config: TrainConfig, owner: str = "me") -> Data:
    output = RunFolder(config.output)
    found = find_data(config, earlier_run(output, config))
    parts = type("Models", (), {"sources": type("Sources", (), {"origins": staticmethod(dict)})})
    claim(output, config, parts, found, owner)  # type: ignore[arg-type]
    return found


def test_a_run_continues_on_its_data_alone_wherever_it_lies(shards: Path, tmp_path: Path) -> None:
    config = bare.config(tmp_path / "run", shards)
    began = claimed(config)
    moved = shutil.copytree(shards, tmp_path / "moved")
    again = claimed(bare.config(tmp_path / "run", moved))
    assert again.identity() == began.identity()
    assert again.source.held_out == began.source.held_out == {"sa_000000.tar": 5}

    write_tar(moved / "sa_000009.tar", [sample(0)])
    with pytest.raises(RunError, match=r"moved has other shards \(7\) than the run began with \(6\); .* bring back"):
        claimed(bare.config(tmp_path / "run", moved))
    (moved / "sa_000009.tar").unlink()
    (moved / "sa_000002.tar").rename(moved / "other.tar")
    with pytest.raises(RunError, match=r"moved has other shards \(6\) than the run began with \(6\)"):
        claimed(bare.config(tmp_path / "run", moved))
    with pytest.raises(RunError, match=r"holds another run \(seed was 0, now 3\)"):
        claimed(bare.config(tmp_path / "run", shards, seed=3))


def accepted(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Configurations that `fit` has taken; it ends there, before it needs Ray."""
    found: list[TrainConfig] = []

    def with_workers(config: TrainConfig) -> TrainConfig:
        found.append(config)
        raise RunError("far enough")

    monkeypatch.setattr(train.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(train, "with_workers", with_workers)
    return found


def test_a_run_is_given_to_its_ranks_with_absolute_places(
    sources: graft.Sources, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train changes the folder that they work in."""
    given = accepted(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name, place in (("tower", sources.tower), ("decoder", sources.decoder), ("data", shards)):
        (tmp_path / name).symlink_to(place)
    places = {"tower": "tower", "decoder": "./decoder", "eval_data": f"file://{shards}"}
    with pytest.raises(RunError, match="far enough"):
        train.fit(bare.config(Path("runs/new"), "data/*.tar", **places))
    (config,) = given
    assert (config.tower, config.decoder) == (f"{tmp_path}/tower", f"{tmp_path}/decoder")
    assert (config.data, config.eval_data, config.output) == (f"{tmp_path}/data/*.tar", str(shards), f"{tmp_path}/runs/new")

    elsewhere = {"tower": "Qwen/Qwen3-VL-2B-Instruct", "decoder": "hf://org/name", "data": "org/data", "eval_data": ""}
    config = replace(config, **elsewhere, output="s3://runs/a")
    assert anchored(config) == config


def test_what_a_checkpoint_does_not_fit_is_refused_before_it_takes_the_output_over(
    sources: graft.Sources, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = accepted(monkeypatch)
    config = bare.config(tmp_path / "run", shards, tower=str(sources.tower), decoder=str(sources.decoder))
    parts, found = find_parts(config), find_data(config, None)
    claim(RunFolder(config.output), config, parts, found, "running")
    weights = graft.frozen_digest(graft.manifest_of(sources))
    model = graft.load_frozen(sources, torch.float32)
    ours = align.Alignment(model, parts.spec, config, found.identity() | {"frozen_weights": weights})
    CheckpointStore(f"{config.output}/checkpoints").write(ours.checkpoint())

    other = shutil.copytree(sources.decoder, tmp_path / "other")
    file = sorted(other.glob("*.safetensors"))[0]
    file.write_bytes(flipped(file.read_bytes(), -2))
    before = (tmp_path / "run" / "run.json").read_bytes()
    for change, says in (
        ({"dtype": "bfloat16"}, "computes in float32 since its start.* bfloat16; give --dtype float32"),
        ({"decoder": str(other)}, "step_00000000 is of another run .frozen_weights was"),
        ({}, "far enough"),
        ({"dtype": "auto"}, "far enough"),
    ):
        with pytest.raises(RunError, match=says):
            train.fit(replace(config, **change))
        assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert [c.dtype for c in taken] == ["float32", "float32"], "auto goes on in what the run began in, on any CPU"


def test_parts_are_refused_before_any_data_is_looked_for(sources: graft.Sources, tmp_path: Path) -> None:
    config = bare.config(tmp_path / "run", tmp_path, tower=str(sources.tower), decoder=str(sources.decoder))
    with pytest.raises(RunError, match="held_out is 0; a run is evaluated on at least 1 sample"):
        train.fit(replace(config, held_out=0))
    bare_decoder = shutil.copytree(sources.decoder, tmp_path / "bare", ignore=shutil.ignore_patterns("model*"))
    with pytest.raises(CheckpointError, match=r"bare lacks model\.safetensors"):
        train.fit(replace(config, decoder=str(bare_decoder)))
    with pytest.raises(CheckpointError, match="decoder holds no Qwen3-VL vision tower"):
        train.fit(replace(config, tower=str(sources.decoder)))
    for place in ("foo://runs/a", "gs://runs/a"):
        with pytest.raises(RunError, match=f"{place}.* cannot be reached: .*; expected a folder, an s3:// URI or a hub id"):
            train.fit(replace(config, output=place))
        with pytest.raises(RunError, match=f"{place} cannot be reached"):
            train.fit(replace(config, decoder=place))
    with pytest.raises(RunError, match="the output /proc/self cannot be written"):
        RunFolder("/proc/self").write("run.json", "{}")


def test_hub_data_of_another_commit_is_refused() -> None:
    def at(commit: str) -> dict[str, Any]:
        return identity([Shard("a.tar", f"hf://datasets/org/name@{commit}/train/a.tar")])

    check_same_data("org/name", at("a" * 40), at("a" * 40))
    says = rf"org/name is at commit {'b' * 40}, the run began with {'a' * 40}; name that one after an @"
    with pytest.raises(RunError, match=says):
        check_same_data("org/name", at("a" * 40), at("b" * 40))
    local = identity([Shard("a.tar", "/data/a.tar")])
    with pytest.raises(RunError, match="is at commit None"):
        check_same_data("/data", at("a" * 40), local)


def test_a_checkpoint_of_other_weights_is_refused() -> None:
    from test_align import CONFIG, SPEC, tiny_a3

    def start(weights: str) -> align.Alignment:
        return align.Alignment(tiny_a3(), SPEC, CONFIG, {"frozen_weights": weights})

    checkpoint = start("one").checkpoint()
    start("one").restore(checkpoint)
    with pytest.raises(RunError, match=r"step_00000000 is of another run \(frozen_weights was 'one', now 'two'\)"):
        start("two").restore(checkpoint)


@pytest.mark.parametrize("begun", [False, True])
def test_sigterm_ends_a_run_that_no_worker_has_begun(
    begun: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Remote:
        """Ray's actor, in this process."""

        def __init__(self) -> None:
            self.board = train.Board.__ray_metadata__.modified_class()  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=getattr(self.board, name))

    monkeypatch.setattr(train.ray, "get", asyncio.run)
    board = Remote()
    if begun:
        asyncio.run(board.board.begin(0))
        asyncio.run(board.board.saved())
    says = "far enough" if begun else "stopped before any worker had begun; the same command starts the run"

    def run() -> None:
        with train._stop_on_sigterm(board):
            signal.raise_signal(signal.SIGTERM)
            raise RunError("far enough")

    with pytest.raises(RunError, match=says):
        run()
    asyncio.run(asyncio.wait_for(board.board.stopping(), 1))
    assert ("saving a checkpoint" in capsys.readouterr().out) == begun


def test_a_run_that_was_taken_over_stops_writing(shards: Path, tmp_path: Path) -> None:
    config = bare.config(tmp_path, shards)
    claimed(config, "first")
    check_owner(RunFolder(config.output), "first")
    claimed(config, "second")
    with pytest.raises(RunError, match="another job has taken over"):
        check_owner(RunFolder(config.output), "first")


# --- bad data --------------------------------------------------------------------------------------------------------


def test_data_that_is_bad_in_a_row_stops_the_run_and_mended_data_continues_it(runs: bare.Runs, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    good = [(f"{n:05d}", sample(n)[1]) for n in range(40)]
    for name in ("a", "b"):
        write_tar(folder / f"{name}.tar", good)
    bad = write_tar(
        folder / "c.tar", [(key, {**files, "txt": b""}) for key, files in good + good[:40] for _ in range(2)][:0]
    )
    ruined = [(f"x{n:05d}", {"jpg": b"", "txt": "a"}) for n in range(130)]
    write_tar(bad, ruined)
    output = tmp_path / "run"
    config = bare.config(output, folder, max_steps=60)
    assert runs.run(config) == 3
    assert "100 samples in a row were unusable, the last c.tar/x" in (output / "error.txt").read_text()
    quarantine, metrics = bare.lines(output / "quarantine.jsonl"), bare.lines(output / "metrics.jsonl")
    last = metrics[-1]
    assert last["seen"] == last["used"] + last["quarantined"]
    assert last["quarantined"] == len(quarantine) == 100
    assert last["used"] == 4 * metrics[-2]["step"]
    assert {(row["shard"], row["reason"][:12]) for row in quarantine} == {("c.tar", "0 bytes are ")}
    stopped = CheckpointStore(f"{output}/checkpoints").steps()[-1]
    assert stopped == metrics[-2]["step"], "what was trained is saved"

    write_tar(bad, [(key, sample(n)[1]) for n, (key, _) in enumerate(ruined)])
    assert runs.run(config) == 0
    assert [r["step"] for r in bare.lines(output / "metrics.jsonl") if "loss" in r] == list(range(1, 61))
    assert bare.lines(output / "quarantine.jsonl") == []


def test_the_end_of_the_data_tells_what_was_passed_over_since_the_last_step() -> None:
    example = random_example(np.random.default_rng(0), "x", (2, 2), 1, 1)
    good = [Candidate(Position(0, 0, n + 1), f"u{n}", example) for n in range(990)]
    bad = [Candidate(Position(0, 0, 991 + n), f"b{n}", None, "bad") for n in range(12)]
    steps = data.batches(iter(good + bad), 4)
    taken: list[data.GlobalBatch] = []
    with pytest.raises(DataEnded, match="11 of 1001 samples") as ended:
        taken.extend(steps)  # as far as they come
    assert taken[-1].counts == Counts(988, 988, 0)
    assert [uid for uid, _ in ended.value.quarantined] == [f"b{n}" for n in range(11)]

    def lost() -> Iterator[Candidate]:
        yield from bad[:3]
        raise RunError("the shard x is gone")

    with pytest.raises(DataEnded, match="the shard x is gone") as ended:
        list(data.batches(lost(), 4))
    assert len(ended.value.quarantined) == 3


# --- a large catalogue -----------------------------------------------------------------------------------------------


def test_deep_in_a_large_catalogue_the_next_sample_comes_at_once(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "x.tar", map(sample, range(3))).read_bytes()
    (tmp_path / "x.tar").unlink()
    for number in range(2891):
        (tmp_path / f"sa_{number:06d}.tar").write_bytes(content)
    source = data.find_source(str(tmp_path), 0, 2)
    whole = itertools.chain.from_iterable(turn.read() for turn in source.turns(Position(7, 2800)))
    expected = [(after, raw.uid) for after, raw in itertools.islice(whole, 5)]
    started = time.monotonic()
    source = data.find_source(str(tmp_path), 0, 2, source.held_out)
    turns = source.turns(expected[0][0])
    found = [(after, raw.uid) for turn in itertools.islice(turns, 2) for after, raw in turn.read()]
    seconds = time.monotonic() - started
    assert found[:4] == expected[1:]
    assert seconds < 2
    assert len(json.dumps(data.position_json(found[0][0]))) < 4096


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    images = [image[n:] + image[:n] for n in range(800)]
    table = pa.table({"text": [f"t{n}" for n in range(800)], "image": images})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    pool, usual = pa.system_memory_pool(), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with open_rows(Shard("a.parquet", str(tmp_path / "a.parquet"))) as rows:
            assert [rows[n].text for n in (799, 0, 400)] == [b"t799", b"t0", b"t400"]
            assert rows[3].image == image[3:] + image[:3]
    finally:
        pa.set_memory_pool(usual)
    assert 0 < pool.max_memory() < 20e6
    assert os.path.getsize(tmp_path / "a.parquet") > 75e6
