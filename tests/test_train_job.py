"""The whole job on a real Ray, through `ray job submit`: real decoder, tower, tokenizer and images, a few steps."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from artemis_vlm import graft
from demo import assets
from jobs import bench, train_a3
from pipelines.checkpoint import CheckpointStore
from pipelines.local import LocalCluster, local_cluster

ROOT = Path(__file__).parent.parent
SMALL = ["--samples", "10", "--held-out", "4", "--batch-size", "2", "--max-pixels", "25600", "--captions", "1"]
SMALL += ["--workers", "1"]  # two are in test_reliability_ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    assets.decoder()  # built here, not inside the job's time
    with local_cluster(tmp_path_factory.mktemp("ray") / "ray.log") as started:
        yield started


def submit(cluster: LocalCluster, *command: str, working_dir: bool = False) -> subprocess.CompletedProcess[str]:
    where = ["--working-dir", "."] if working_dir else []
    return subprocess.run(
        ["ray", "job", "submit", "--address", cluster.dashboard, *where, "--", *command],
        env=dict(cluster.env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_the_job_runs_continues_and_refuses_another_run(cluster: LocalCluster, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = ["python", "jobs/train_a3.py", "demo", *SMALL, "--output", str(output)]
    done = submit(cluster, *job, working_dir=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "eval loss" in done.stdout
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert all(r["seen"] == r["used"] + r["quarantined"] for r in records[1:])
    assert {"loss", "eval_loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "data_wait"} <= records[-1].keys()
    for name in ("loss.png", "report.html", "captions.json", "run.json"):
        assert (output / name).stat().st_size > 0, name
    assert list((output / "tensorboard").iterdir())
    assert CheckpointStore(str(output / "checkpoints")).steps()[-1] == 3
    assert graft.verify(output / "a3", graft.Sources(assets.tower(), assets.decoder())) == []

    run, card = json.loads((output / "run.json").read_text()), (output / "a3" / "README.md").read_text()
    assert all(str(said) in card for said in (run["started"], run["finished"], run["machine"]["device"]))
    assert f"| 3 | 100% | {records[-1]['eval_loss']:.4f} |" in card
    assert hashlib.sha256((output / "a3" / "manifest.json").read_bytes()).hexdigest() in card

    other = submit(cluster, *job, "--seed", "7")
    assert other.returncode != 0
    assert "holds another run (seed was 0, now 7)" in other.stdout


def test_bad_input_is_one_sentence_and_a_failed_job(cluster: LocalCluster, tmp_path: Path) -> None:
    """`ray job submit jobs/train_a3.py`: the file runs by itself."""
    (tmp_path / "empty").mkdir()
    done = submit(cluster, "jobs/train_a3.py", "--data", str(tmp_path / "empty"), "--output", str(tmp_path / "run"))
    assert done.returncode != 0
    assert f"error: the data {tmp_path / 'empty'} holds nothing" in done.stdout
    assert "Traceback" not in done.stdout


def test_bad_options_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_a3.main(["--keep", "0"]) == bench.main(["serve", "--parts", "beside"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: keep is 0; it must be at least 1\nerror: the part beside needs")


def test_the_cluster_leaves_no_process(tmp_path: Path) -> None:
    marker = f"a3-test-{os.getpid()}"
    code = (
        "from pathlib import Path; from pipelines.local import local_cluster\n"
        f"with local_cluster(Path({str(tmp_path / 'ray.log')!r})) as c: print(c.env['RAY_ADDRESS'])"
    )
    env = {**os.environ, "A3_TEST_MARKER": marker, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, timeout=200)
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:  # gone meanwhile, or a zombie
            continue
        if marker.encode() in environment and process.name != str(os.getpid()):
            left.append((process / "cmdline").read_bytes())
    assert left == []
