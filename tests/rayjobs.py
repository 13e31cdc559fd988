"""Runs of a tiny model through the whole job on a Ray cluster, to watch, stop, kill and compare."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from artemis_vlm import graft
from pipelines.local import LocalCluster
from pipelines.recipe import DEMO, TrainConfig

ROOT = Path(__file__).parent.parent
#: A run of about ten seconds of steps, beside what Ray takes to start it.
FIELDS: dict[str, Any] = {
    "samples": 70,
    "held-out": 6,
    "batch-size": 4,
    "max-steps": 120,
    "learning-rate": 1e-2,
    "max-pixels": 4096,
    "max-tokens": 256,
    "micro-tokens": 200,
    "dtype": "float32",
    "workers": 1,
    "threads": 1,
    "save-every": 20,
    "eval-every": 40,
    "captions": 1,
    "max-bad-share": 1.0,
    "export": "projector",
    "decode-workers": 1,
}


def config(sources: graft.Sources, data: Path | str, output: Path, **fields: Any) -> TrainConfig:
    """The configuration of such a run."""
    given = {name.replace("-", "_"): value for name, value in FIELDS.items()} | fields
    places = {"tower": sources.tower, "decoder": sources.decoder, "data": data, "output": output}
    return replace(DEMO, **given, **{name: str(place) for name, place in places.items()})


@dataclass
class Job:
    client: JobSubmissionClient
    id: str

    @property
    def running(self) -> bool:
        return not self.client.get_job_status(self.id).is_terminal()

    def log(self) -> str:
        return str(self.client.get_job_logs(self.id))

    def stop(self) -> None:
        self.client.stop_job(self.id)

    def wait(self, timeout: float = 600) -> JobStatus:
        deadline = time.monotonic() + timeout
        while self.running:
            assert time.monotonic() < deadline, self.log()[-4000:]
            time.sleep(0.2)
        return self.client.get_job_status(self.id)

    def succeeds(self, timeout: float = 600) -> str:
        status = self.wait(timeout)
        assert status == JobStatus.SUCCEEDED, self.log()[-6000:]
        return self.log()


def client_of(cluster: LocalCluster) -> JobSubmissionClient:
    return JobSubmissionClient(cluster.dashboard, headers={"Authorization": f"Bearer {cluster.env['RAY_AUTH_TOKEN']}"})


@dataclass
class Jobs:
    """Starts jobs with the tiny model on a cluster."""

    cluster: LocalCluster
    sources: graft.Sources
    data: str

    def start(self, output: Path | str, **fields: Any) -> Job:
        client = client_of(self.cluster)
        places = {"tower": self.sources.tower, "decoder": self.sources.decoder, "data": self.data, "output": output}
        given = FIELDS | places | {name.replace("_", "-"): value for name, value in fields.items()}
        flags = " ".join(f"--{name} '{value}'" for name, value in given.items())
        environment = {name: value for name, value in self.cluster.env.items() if name.startswith("AWS_")}
        command = f"cd {ROOT} && exec python jobs/train_a3.py demo {flags}"
        return Job(client, client.submit_job(entrypoint=command, runtime_env={"env_vars": environment}))


def until(condition: Callable[[], Any], job: Job, timeout: float = 300) -> Any:
    """Waits while the job runs."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert job.running, job.log()[-6000:]
        assert time.monotonic() < deadline, job.log()[-6000:]
        time.sleep(0.05)
    return found


def processes(cluster: LocalCluster, name: str) -> list[int]:
    """Processes of this cluster whose command line has the name, newest last."""
    mark = cluster.env["RAY_AUTH_TOKEN"].encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if name.encode() in (place / "cmdline").read_bytes() and mark in (place / "environ").read_bytes():
                found.append((place.stat().st_mtime, int(place.name)))
        except OSError:  # gone meanwhile
            continue
    return [pid for _, pid in sorted(found)]


def kill(cluster: LocalCluster, name: str, most: int | None = None) -> int:
    """kill -9 of the cluster's processes of that name, or of so many of them; how many it hit."""
    found = processes(cluster, name)[:most]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return len(found)


def curve(text: str) -> list[dict[str, float]]:
    """What of metrics.jsonl must not depend on what happened to the run."""
    exact = ("step", "loss", "eval_loss", "grad_norm", "lr", "seen", "used", "quarantined")
    return [{k: r[k] for k in exact if k in r} for r in map(json.loads, text.splitlines())]


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
