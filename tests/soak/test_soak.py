"""What is too long for every day: `make soak`. Kills through Ray, a lost node, faults between the run and its store."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import bare
import numpy as np
import pytest
import ray
import rayjobs
import s3
import s3fs
from PIL import Image
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus
from samples import caption_encoder, sample, write_tar
from transformers import PreTrainedTokenizerBase

from artemis_vlm import graft
from demo import assets
from pipelines import data, feed
from pipelines.checkpoint import CheckpointStore
from pipelines.local import local_cluster
from pipelines.recipe import TrainConfig
from pipelines.train import MAX_FAILURES, fit

LONG = {"max_steps": 400}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare.write_data(tmp_path_factory.mktemp("bare") / "shards")


@pytest.fixture(scope="module")
def jobs(sources: graft.Sources, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[rayjobs.Jobs]:
    with local_cluster(tmp_path_factory.mktemp("ray") / "ray.log") as cluster:
        yield rayjobs.Jobs(cluster, sources, str(shards))


@pytest.fixture(scope="module")
def whole(jobs: rayjobs.Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through Ray that nothing happened to."""
    output = tmp_path_factory.mktemp("whole")
    jobs.start(output, **LONG).succeeds()
    return output


def left_by(output: Path) -> dict[str, Any]:
    """All that must be the same to the bit."""
    store = CheckpointStore(f"{output}/checkpoints")
    last = store.read(store.steps()[-1])
    return {
        "curve": rayjobs.curve((output / "metrics.jsonl").read_text()),
        "quarantine": (output / "quarantine.jsonl").read_text(),
        "tensors": {f"{s}/{k}": v.numpy().tobytes() for s, part in last.tensors.items() for k, v in part.items()},
        "state": {k: v for k, v in last.state.items() if k != "run"},
        "a3": (output / "a3" / "projector.safetensors").read_bytes(),
    }


def test_a_hundred_kills_of_the_bare_loop(shards: Path, tmp_path: Path) -> None:
    killed: Counter[str] = Counter()
    with bare.runs(assets.tokenizer()) as runs:
        started = time.monotonic()
        assert runs.run(bare.config(tmp_path / "whole", shards)) == 0
        seconds, expected = time.monotonic() - started, bare.result(tmp_path / "whole")
        for number, point in enumerate(bare.kill_points(1, seconds)):
            config = bare.config(tmp_path / str(number), shards)
            if runs.run(config, **point) == -9:
                killed[next(iter(point))] += 1
            assert runs.run(config) == 0, point
            assert bare.result(tmp_path / str(number)) == expected, point
            if killed.total() == 100:
                break
    print(f"\n{killed.total()} kills of the bare loop, {killed['save_call']} inside a save: the same bits after each")


def test_kills_through_ray(jobs: rayjobs.Jobs, whole: Path, tmp_path: Path) -> None:
    """One run that loses everything it has, one after the other, between two checkpoints each."""
    output = tmp_path / "run"
    store = CheckpointStore(f"{output}/checkpoints")

    def next_checkpoint(job: rayjobs.Job) -> None:
        before = max(store.steps(), default=0)
        rayjobs.until(lambda: max(store.steps(), default=0) > before, job)

    killed: Counter[str] = Counter()
    job = jobs.start(output, **LONG)
    for victim in ("ray::RayTrainWorker", "ray::MapWorker(MapBatches(Encode))", "ray::Feeder", "ray::RayTrainWorker"):
        next_checkpoint(job)
        killed[victim] += bool(rayjobs.kill(jobs.cluster, victim))
    next_checkpoint(job)
    assert rayjobs.kill(jobs.cluster, "jobs/train_a3.py")
    killed["driver"] += 1
    assert job.wait() == JobStatus.FAILED
    snapshots = [p for folder in Path(tempfile.gettempdir()).glob("artemis-ray-train-*") for p in folder.rglob("*.json")]
    assert not snapshots, "Ray Train keeps no snapshot of its own that could be damaged"
    jobs.start(output, **LONG).succeeds()
    assert left_by(output) == left_by(whole)
    print(f"\nthrough Ray, killed: {dict(killed)}; the same bits")


def test_one_of_two_workers_is_killed(jobs: rayjobs.Jobs, tmp_path: Path) -> None:
    two = {"workers": 2, **LONG}
    jobs.start(tmp_path / "whole", **two).succeeds()
    output = tmp_path / "killed"
    job, store = jobs.start(output, **two), CheckpointStore(f"{output}/checkpoints")
    rayjobs.until(store.steps, job)
    assert rayjobs.kill(jobs.cluster, "ray::RayTrainWorker", 1) == 1
    job.succeeds()
    assert left_by(output) == left_by(tmp_path / "whole")
    print("\none of two workers killed: the bits of two that nothing happened to")


def test_a_worker_that_always_fails_stops_the_run(jobs: rayjobs.Jobs, tmp_path: Path) -> None:
    """Restarts end where none gets a checkpoint further."""
    job = jobs.start(tmp_path, max_steps=100_000, save_every=100_000)
    metrics, seen = tmp_path / "metrics.jsonl", 0

    def training_anew() -> bool:
        return metrics.exists() and metrics.stat().st_ino != seen and metrics.stat().st_size > 0

    for _ in range(MAX_FAILURES + 1):
        rayjobs.until(training_anew, job)
        seen = metrics.stat().st_ino
        assert rayjobs.kill(jobs.cluster, "ray::RayTrainWorker")
    assert job.wait() == JobStatus.FAILED
    assert f"error: the workers failed {MAX_FAILURES + 1} times in a row without one checkpoint more" in job.log()


def test_no_such_node_is_told_within_a_minute(jobs: rayjobs.Jobs, tmp_path: Path) -> None:
    started = time.monotonic()
    job = jobs.start(tmp_path, worker_label="a3/role=nowhere")
    assert job.wait(120) == JobStatus.FAILED
    seconds = time.monotonic() - started
    assert "error: no node of this cluster has the label a3/role=nowhere" in job.log()
    assert "Traceback" not in job.log()
    assert seconds < 60
    print(f"\nno such node: told after {seconds:.0f} s")


def test_data_and_output_on_a_failing_s3(
    jobs: rayjobs.Jobs, whole: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory, sources: graft.Sources
) -> None:
    with (
        s3.moto() as server,
        s3.faulty(server, 0.05) as (url, injected),
        rayjobs.environment(s3.environment(server)),
    ):
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("runs")
        for path in shards.iterdir():
            files.pipe_file(f"runs/data/{path.name}", path.read_bytes())
        with (
            rayjobs.environment({"AWS_ENDPOINT_URL": url}),
            local_cluster(tmp_path_factory.mktemp("ray") / "log") as ray_s3,
        ):
            rayjobs.Jobs(ray_s3, sources, "s3://runs/data").start("s3://runs/one", **LONG).succeeds(900)
        found = rayjobs.curve(files.cat_file("runs/one/metrics.jsonl").decode())
        assert found == left_by(whole)["curve"]
        assert files.cat_file("runs/one/quarantine.jsonl").decode() == left_by(whole)["quarantine"]
        assert files.cat_file("runs/one/a3/projector.safetensors") == left_by(whole)["a3"]
        s3fs.S3FileSystem.clear_instance_cache()
    print(f"\nS3 with {injected.total()} faults {dict(injected)}: the same bits")


def test_a_lost_node_is_survived(sources: graft.Sources, shards: Path, whole: Path, tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, labels={"a3/role": "trains"}) for _ in range(2)]
    here = Path(__file__).parent.parent
    with rayjobs.environment({"PYTHONPATH": f"{here.parent}:{here}", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}):
        ray.init(address=cluster.address, log_to_driver=False)
    try:
        cluster.wait_for_nodes()
        config = rayjobs.config(sources, shards, tmp_path, worker_label="a3/role=trains", **LONG)
        lost: list[str] = []

        def lose() -> None:
            store = CheckpointStore(f"{tmp_path}/checkpoints")
            while not store.steps():
                time.sleep(0.1)
            (place,) = [a["Address"]["NodeID"] for a in actors().values() if is_worker(a)]
            (node,) = [node for node in nodes if node.node_id == place]
            cluster.remove_node(node)
            lost.append(place)

        threading.Thread(target=lose, daemon=True).start()
        fit(config)
        assert lost
        assert left_by(tmp_path) == left_by(whole)
        print("\na node lost, of two that train: the other took over; the same bits")
    finally:
        ray.shutdown()
        cluster.shutdown()


def is_worker(actor: dict[str, Any]) -> bool:
    return actor["State"] == "ALIVE" and actor["ActorClassName"].endswith("RayTrainWorker")


def test_deep_in_a_catalogue_the_first_batch_comes_at_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """2,891 shards, one of them of 350 MB, against a catalogue of one small shard: what Ray takes to start."""
    encoder = caption_encoder(tokenizer)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (190, 190, 3), dtype=np.uint8))
    image.save(tmp_path / "x.jpg", quality=92)
    big = {"jpg": (tmp_path / "x.jpg").read_bytes(), "txt": "a picture"}
    rows = 350_000_000 // (len(big["jpg"]) + 2048)
    folder, alone = tmp_path / "catalogue", tmp_path / "alone"
    folder.mkdir()
    alone.mkdir()
    small = write_tar(alone / "sa_000000.tar", map(sample, range(40))).read_bytes()
    for number in range(2891):
        (folder / f"sa_{number:06d}.tar").write_bytes(small)
    write_tar(folder / "sa_001000.tar", ((f"{n:06d}", big) for n in range(rows)))
    here = Path(__file__).parent.parent
    with rayjobs.environment({"PYTHONPATH": f"{here.parent}:{here}"}):
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        config = TrainConfig(samples=100, held_out=0, batch_size=8, micro_tokens=500, decode_workers=1)

        def first_batch(place: Path, position: dict[str, int] | None) -> float:
            started = time.monotonic()
            source = data.find_source(str(place), 0, 0, {})
            state = {"position": position, "counts": {}, "micro_tokens": 500}
            name = feed.start_feeder(config, source, encoder, state, 1, None)
            with closing(feed.RayFeed(feed.find_feeder(name), 0)) as steps:
                assert steps.next() is not None
                return time.monotonic() - started

        first_batch(alone, None)
        alone_s = first_batch(alone, None)
        source = data.find_source(str(folder), 0, 0, {})
        ranks = {shard.name: rank for rank, shard in enumerate(source.order(3))}
        deep_s = first_batch(folder, {"epoch": 3, "shard": 2600, "row": 17})
        big_s = first_batch(folder, {"epoch": 3, "shard": ranks["sa_001000.tar"], "row": rows // 2})
    finally:
        ray.shutdown()
    print(f"\nfirst batch: one small shard {alone_s:.1f} s, deep in 2,891 {deep_s:.1f} s, in one of 350 MB {big_s:.1f} s")
    assert deep_s - alone_s < 5
    assert big_s - alone_s < 5
