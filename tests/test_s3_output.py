"""A run's output on S3 (a real server of its protocol), and what a network does to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3
import s3fs
from samples import write_shards
from test_reliability import DAMAGES, FILES, made

from artemis_vlm import RunError, graft
from jobs.graft import main
from pipelines import storage
from pipelines.checkpoint import CheckpointStore
from pipelines.shards import find_shards, open_rows
from pipelines.storage import RunFolder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3.moto() as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in s3.environment(server).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # an earlier one would know another endpoint
    files = s3fs.S3FileSystem()
    if files.exists("runs"):
        files.rm("runs", recursive=True)
    files.mkdir("runs")
    yield "s3://runs/one"
    s3fs.S3FileSystem.clear_instance_cache()


def test_the_list_of_checksums_goes_up_last_and_without_it_nothing_counts(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(f"{bucket}/checkpoints", keep=2)
    store.write(made(1))
    files = s3fs.S3FileSystem()
    put = files.pipe_file
    for files_sent in range(len(FILES)):
        sent: list[str] = []

        def dying(path: str, content: bytes, sent: list[str] = sent, limit: int = files_sent) -> None:
            if len(sent) == limit:
                raise SystemExit  # the process ends here
            sent.append(path.rpartition("/")[2])
            put(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(store._files, "pipe_file", dying)
            with pytest.raises(SystemExit):
                store.write(made(2))
        assert "checksums.json" not in sent
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            newest = CheckpointStore(f"{bucket}/checkpoints").newest()
        assert newest is not None
        assert newest.step == 1
        assert ("step_00000002 is not whole: checksums.json is missing" in caplog.text) == bool(sent)
    for step in (2, 3, 4):
        store.write(made(step), best_step=1)
    assert store.steps() == [1, 3, 4]


@pytest.mark.parametrize("damage", ["missing", "first half", "middle bit flipped"])
def test_damaged_objects_are_named_and_passed_over(bucket: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(f"{bucket}/checkpoints")
    store.write(made(1))
    store.write(made(2))
    files = s3fs.S3FileSystem()
    path = "runs/one/checkpoints/step_00000002/optimizer.safetensors"
    changed = DAMAGES[damage](files.cat_file(path))
    files.rm(path) if changed is None else files.pipe_file(path, changed)
    with caplog.at_level(logging.WARNING):
        newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    assert "step_00000002" in caplog.text
    assert "optimizer.safetensors" in caplog.text
    store.write(made(2))
    assert store.read(2).step == 2


def test_errors_slow_answers_and_resets_change_nothing(
    server: str, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    local = write_shards(tmp_path / "shards", 12, 4)
    for path in local.iterdir():
        s3fs.S3FileSystem().pipe_file(f"runs/shards/{path.name}", path.read_bytes())
    with s3.faulty(server, 0.2) as (url, injected):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        store = CheckpointStore(f"{bucket}/checkpoints", keep=2)
        for step in range(1, 9):
            store.write(made(step))
        newest = store.newest()
        assert newest is not None
        assert newest.step == 8
        assert store.steps() == [7, 8]

        folder = RunFolder(bucket)
        for number in range(10):
            folder.write("metrics.jsonl", f"{number}\n" * 1000)
            other = RunFolder(bucket)
            assert other.pull("metrics.jsonl")
            assert (other.path / "metrics.jsonl").read_text() == f"{number}\n" * 1000
            other.discard()
        assert not folder.pull("quarantine.jsonl")
        folder.discard()

        read = [samples_of(place) for place in (str(local), "s3://runs/shards")]
        assert read[0] == read[1]
        s3fs.S3FileSystem.clear_instance_cache()
    assert min(injected[kind] for kind in ("500", "503", "slow", "reset", "cut")) >= 3, injected
    print(f"\n{injected.total()} faults injected: {dict(injected)}")


def test_a_graft_goes_from_s3_to_s3(
    bucket: str, sources: graft.Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of tower and decoder is fetched, the model goes up with its config last, and nothing is left here."""
    monkeypatch.setenv("ARTEMIS_VLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    files = s3fs.S3FileSystem()
    for name, folder in (("tower", sources.tower), ("decoder", sources.decoder)):
        files.put(str(folder), f"runs/{name}", recursive=True)
    build = ["build", "--vision", "s3://runs/tower", "--text", "s3://runs/decoder", "--output", f"{bucket}/a3"]
    assert main(build) == 0
    uploaded = {path: files.info(path)["LastModified"] for path in files.find(f"{bucket}/a3")}
    assert max(uploaded.values()) == uploaded["runs/one/a3/config.json"]
    assert main(["verify", f"{bucket}/a3", "--against", "s3://runs/tower", "s3://runs/decoder"]) == 0
    assert not list((tmp_path / "temporary").iterdir())
    assert main(build) == 1
    assert "already holds a model" in capsys.readouterr().err


def samples_of(uri: str) -> list[Any]:
    found = []
    for shard in find_shards(uri):
        with open_rows(shard) as rows:
            found += [rows[i] for i in range(len(rows))]
    return found


def test_a_store_that_stays_away_is_told_in_a_sentence(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3.faulty(server, 1.0, ["500"]) as (url, injected):
        for name, value in s3.environment(url).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(RunError, match=r"step_00000001/\S+ could not be written in 4 attempts: .*injected"):
            CheckpointStore("s3://runs/one/checkpoints").write(made(1))
        s3fs.S3FileSystem.clear_instance_cache()
    assert pauses == [1.0, 2.0, 4.0]
    assert injected["500"] >= 4
