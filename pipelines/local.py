"""A Ray cluster: one that is there, or one's own on this machine, started, waited for, and ended by its own pid.

`ray stop` would kill every Ray process on the host, and `ray.init()` would join a cluster that it finds; this does
neither. Everything listens on loopback and asks for a token.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ray

from artemis_vlm.errors import RunError

logger = logging.getLogger(__name__)

ROOT: Final = Path(__file__).resolve().parent.parent
#: Ray's niceness of 15 keeps a busy cluster's daemons responsive; on two cores it made a training step 2.5 times as long.
SETTINGS: Final = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
START_TIMEOUT_S: Final = 90.0
STOP_TIMEOUT_S: Final = 30.0
#: Seconds to wait for nodes with room before saying that there are none.
ROOM_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True)
class LocalCluster:
    """What a client process needs: environment variables that lead to the cluster, and the address for jobs."""

    env: Mapping[str, str]
    dashboard: str
    pid: int


def is_alone() -> bool:
    """Whether `join_or_start` will start Ray, so that this machine is all that there is to compute on."""
    return not ray.is_initialized() and "RAY_ADDRESS" not in os.environ


def join_or_start(num_cpus: int = 4) -> None:
    """Connects to the cluster that `RAY_ADDRESS` names, as in a submitted job, or to one that ends with this process.

    Args:
        num_cpus: least logical CPUs of the latter; more than cores is fine, what runs on them waits for each other.
    """
    if ray.is_initialized():
        return
    if not is_alone():
        ray.init(log_to_driver=False)
        return
    # Its workers take their environment from here, and must find this project wherever the process was started.
    os.environ |= SETTINGS | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    cpus = max(num_cpus, os.cpu_count() or 1)
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")


def check_room(replicas: Sequence[Mapping[str, float]], timeout_s: float) -> None:
    """Returns when the cluster has nodes that can hold the replicas, if nothing else ran there.

    Args:
        replicas: what each asks of its node: amounts by Ray's names, such as CPU.
        timeout_s: how long nodes may take to join.

    Raises:
        RunError: it has not. Ray itself would wait for ever.
    """
    deadline = time.monotonic() + timeout_s
    told = False
    while lack := _lack(replicas, [n["Resources"] for n in ray.nodes() if n["Alive"]]):
        if time.monotonic() >= deadline:
            raise RunError(f"{lack}; start more nodes, or ask for less")
        if not told:
            logger.warning("%s; waiting up to %g s for nodes", lack, timeout_s)
        told = True
        time.sleep(1)


def _lack(replicas: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> str:
    """What there is too little of; empty where there is enough."""
    for replica in replicas:
        if not any(all(node.get(kind, 0) >= amount for kind, amount in replica.items()) for node in nodes):
            asked = ", ".join(f"{amount:g} {kind}" for kind, amount in replica.items() if amount)
            return f"a replica asks for {asked}, and no node of this cluster has that"
    for kind in sorted({kind for replica in replicas for kind in replica}):
        asked_of_all = round(sum(replica.get(kind, 0) for replica in replicas), 4)  # what Ray counts in
        there = sum(node.get(kind, 0) for node in nodes)
        if asked_of_all > there:
            return f"{len(replicas)} replicas ask for {asked_of_all:g} {kind}, and the nodes of this cluster have {there:g}"
    return ""


@contextmanager
def local_cluster(log: Path, num_cpus: int = 4, stop_wait_s: int = 60) -> Iterator[LocalCluster]:
    """Starts a head node, and ends it and all its children on the way out.

    Args:
        log: takes what Ray prints.
        num_cpus: logical CPUs; more than cores is fine, fewer than 4 can leave a Data stage without one.
        stop_wait_s: seconds that a stopped job has for its last checkpoint.

    Raises:
        RunError: Ray did not come up; the text names the log.
    """
    port, dashboard_port, client_port, agent_port = free_ports(4)
    # Short: Ray puts sockets there, and their paths have a limit of 107 bytes.
    home = tempfile.mkdtemp(prefix="a3-")
    env = {
        **os.environ,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report() else takes up to 2 s
        **SETTINGS,
        # There is no other node that the jobs could go to while this one drains, which would take its 30 s.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    start = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={num_cpus}"]
    start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"]
    # Two clusters on one machine would else share the agent's fixed port, and the second could take no job.
    start += [f"--dashboard-agent-listen-port={agent_port}", f"--temp-dir={home}", "--disable-usage-stats"]
    del env["RAY_ADDRESS"]  # `ray start` refuses it
    with log.open("wb") as out:
        process = subprocess.Popen(start, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    try:
        # Jobs are listed by the one and started by the other, which may come up later.
        for url in (f"{dashboard}/api/jobs/", f"http://127.0.0.1:{agent_port}/api/local_raylet_healthz"):
            _wait_until_ready(process, url, env["RAY_AUTH_TOKEN"], log)
        yield LocalCluster({**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}, dashboard, process.pid)
    finally:
        _end(process)
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, token: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunError(f"Ray ended with code {process.returncode} while starting; see {log}")
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RunError(f"Ray was not ready after {START_TIMEOUT_S:.0f} s; see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """TERM to the head, which ends its children; what has not gone in time is killed with its process group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_ports(count: int) -> list[int]:
    """TCP ports on loopback that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
