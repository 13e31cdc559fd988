"""The job stopped and continued on another number of workers, its output on S3: the curve of a run without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import bare
import pytest
import rayjobs
import s3
import s3fs
import torch
from ray.job_submission import JobStatus

from artemis_vlm import graft
from pipelines import align
from pipelines.checkpoint import CheckpointStore
from pipelines.inputs import find_parts
from pipelines.local import local_cluster
from pipelines.recipe import TrainConfig


@pytest.fixture(scope="module")
def jobs(sources: graft.Sources, tmp_path_factory: pytest.TempPathFactory) -> Iterator[rayjobs.Jobs]:
    folder = tmp_path_factory.mktemp("ray")
    shards = bare.write_data(folder / "shards")
    with s3.bucket("runs"), local_cluster(folder / "ray.log") as cluster:
        yield rayjobs.Jobs(cluster, sources, str(shards))


STEPS = 48
SHORT = {"max_steps": STEPS, "save_every": 8, "eval_every": 16}


def without_ray(config: TrainConfig) -> None:
    """The same run by the bare loop in this process, to its end."""
    threads = torch.get_num_threads()
    parts = find_parts(config)
    try:
        align.set_threads(config.threads, 1)
        bare.train(config, parts.encoder(config), parts=parts)
    finally:
        torch.set_num_threads(threads)


def test_a_run_on_s3_stops_within_its_time_and_goes_on_with_two_workers(jobs: rayjobs.Jobs, tmp_path: Path) -> None:
    without_ray(rayjobs.config(jobs.sources, jobs.data, tmp_path / "whole", **SHORT))
    whole = rayjobs.curve((tmp_path / "whole" / "metrics.jsonl").read_text())

    output = "s3://runs/stopped"
    store = CheckpointStore(f"{output}/checkpoints")
    job = jobs.start(output, **SHORT)
    rayjobs.until(store.steps, job)
    started = time.monotonic()
    job.stop()
    assert job.wait() == JobStatus.STOPPED
    seconds = time.monotonic() - started
    assert seconds < 30
    log = job.log()
    assert "SIGTERM: saving a checkpoint" in log
    newest = store.newest()
    assert newest is not None
    assert 0 < newest.step < STEPS
    assert f"error: stopped at step {newest.step} of {STEPS}; the same command continues from there" in log

    jobs.start(output, workers=2, **SHORT).succeeds()
    files = s3fs.S3FileSystem()
    found = rayjobs.curve(files.cat_file(f"{output}/metrics.jsonl").decode())
    assert [r["step"] for r in found] == [r["step"] for r in whole] == list(range(STEPS + 1))
    for ours, theirs in zip(found, whole):
        evaluated = [record.pop("eval_loss", 0.0) for record in (ours, theirs)]
        assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)  # ranks sum the held-out samples in another order
        assert ours == (theirs if ours["step"] <= newest.step else pytest.approx(theirs, rel=1e-5))
        assert ours.get("seen") == theirs.get("seen")
    last, expected = (CheckpointStore(f"{o}/checkpoints").newest() for o in (output, tmp_path / "whole"))
    assert last is not None
    assert expected is not None
    assert last.state["position"] == expected.state["position"]
    quarantine = [files.cat_file(f"{output}/quarantine.jsonl"), (tmp_path / "whole" / "quarantine.jsonl").read_bytes()]
    assert quarantine[0] == quarantine[1] != b""
    assert quarantine[0].count(b"\n") == found[-1]["quarantined"]
    for name in ("report.html", "loss.png", "captions.json", "a3/projector.safetensors", "a3/manifest.json"):
        assert files.size(f"{output}/{name}") > 0, name
