"""A server under load while its replicas come, go, die and are replaced: no request may fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import rayjobs
import serving
import yaml
from ray import serve as ray_serve
from ray.job_submission import JobStatus
from serving import KEY, http, picture, replica_pids, turn

from artemis_vlm.engines import EngineConfig
from pipelines import serve
from pipelines.local import free_ports, local_cluster
from pipelines.openai import ChatRequest
from pipelines.stages import ServeConfig, Stage

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with serving.cluster(16):
        yield


@pytest.fixture(scope="module")
def config(a3: Path) -> ServeConfig:
    stage = Stage(min_replicas=1, max_replicas=2, target_ongoing=2.0)
    return ServeConfig(
        model=str(a3),
        name="tiny",
        port=free_ports(1)[0],
        dtype="float32",
        key_hashes=(hashlib.sha256(KEY.encode()).hexdigest(),),
        engine=EngineConfig(slots=4, max_length=600),
        encoder_stage=stage,
        decoder_stage=stage,
        cache_bytes=0,  # so that every image is encoded
        max_requests=32,
    )


@pytest.fixture(scope="module")
def server(cluster: None, config: ServeConfig) -> Iterator[str]:
    server = serve.Server(config)
    yield server.url
    server.stop()


class Load:
    """Clients that ask again as soon as they are answered; what came of it by outcome."""

    def __init__(self, url: str, make: Callable[[int], dict[str, Any]], clients: int) -> None:
        self.url, self.make, self.clients = url, make, clients
        self.outcomes: Counter[str] = Counter()
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[Load]:
        with ThreadPoolExecutor(self.clients) as pool:
            working = [pool.submit(self._client, number) for number in range(self.clients)]
            try:
                yield self
            finally:
                self._over.set()
            for each in working:
                each.result()

    def _client(self, number: int) -> None:
        count = 0
        while not self._over.is_set():
            asked = self.make(number + self.clients * count)
            count += 1
            try:
                status, _, text = http(f"{self.url}/v1/chat/completions", json.dumps(asked).encode(), timeout=150)
            except OSError as error:
                self.outcomes[repr(error)] += 1
                continue
            self.outcomes[self._outcome(status, text, bool(asked.get("stream")))] += 1

    @staticmethod
    def _outcome(status: int, text: bytes, stream: bool) -> str:
        if status != 200:
            return f"{status} {text.decode()[:200]}"
        if not stream:
            return "answered" if json.loads(text)["choices"][0]["finish_reason"] else "no reason"
        whole, error = text.endswith(b"data: [DONE]\n\n"), b'"error"' in text
        if whole and error:
            return "an error and [DONE]"
        return "answered" if whole else "stream ended with an error" if error else "broken stream"


def with_image(number: int, **changes: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "messages": turn("Say.", picture(number % 29, (640, 480))), "max_tokens": 1, "temperature": 0}
    return asked | changes


def text_only(number: int, **changes: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "messages": turn(f"Say {number}."), "max_tokens": 150, "temperature": 0, "stop": "\x00never"}
    return asked | {"reasoning_effort": "none"} | changes


def mixed(number: int) -> dict[str, Any]:
    return with_image(number, max_tokens=20) if number % 2 else text_only(number, max_tokens=40)


def replicas() -> dict[str, int]:
    deployments = ray_serve.status().applications[serve.APP].deployments
    return {name: deployment.replica_states.get("RUNNING", 0) for name, deployment in deployments.items()}


def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"{what} did not come within {seconds:.0f} s: {replicas()}"
        time.sleep(0.2)
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("stage", "other", "make"), [("VisionEncoder", "Decoder", with_image), ("Decoder", "VisionEncoder", text_only)]
)
def test_each_stage_scales_alone(server: str, stage: str, other: str, make: Callable[[int], dict[str, Any]]) -> None:
    until(lambda: replicas()[stage] == replicas()[other] == 1, 120, "one replica each")
    heavy, light = Load(server, make, 12), Load(server, make, 1)
    with heavy.running():
        up = until(lambda: replicas()[stage] == 2, 90, f"the second {stage}")
        time.sleep(3)
    alone = replicas()[other]
    with light.running():  # the second one leaves while there is work
        down = until(lambda: replicas()[stage] == 1, 120, f"the end of the second {stage}")
    done = heavy.outcomes + light.outcomes
    print(f"\n{stage}: 2 after {up:.0f} s, 1 again {down:.0f} s after the load; {dict(done)}")
    assert set(done) == {"answered"}
    assert alone == 1


def test_kills_under_load(server: str, config: ServeConfig) -> None:
    """Whole answers all come, whichever process dies; streams end with [DONE] or with an error, never with neither."""
    two = Stage(min_replicas=2, max_replicas=2)
    ray_serve.run(serve.build_app(dataclasses.replace(config, encoder_stage=two, decoder_stage=two)), name=serve.APP)
    chance = random.Random(1)
    load = Load(server, mixed, 6)
    streams = Load(server, lambda number: text_only(number, stream=True, max_tokens=100), 2)
    killed = 0
    with load.running(), streams.running():
        for _ in range(3):
            for stage in ("VisionEncoder", "Decoder"):
                os.kill(chance.choice(replica_pids(stage)), signal.SIGKILL)
                killed += 1
            time.sleep(1)
            until(lambda: replicas()["VisionEncoder"] == replicas()["Decoder"] == 2, 120, "replicas in place of the killed")
    print(f"\n{killed} kills: {dict(load.outcomes)}; streams {dict(streams.outcomes)}")
    assert set(load.outcomes) == {"answered"}
    assert set(streams.outcomes) <= {"answered", "stream ended with an error"}


def test_rolling_updates_under_load(server: str, config: ServeConfig, tmp_path: Path) -> None:
    """A good one, one whose model is not there, and one whose model cannot be loaded."""
    one = Stage()
    config = dataclasses.replace(config, encoder_stage=one, decoder_stage=one)
    ray_serve.run(serve.build_app(config), name=serve.APP)
    before = set(replica_pids("Decoder") + replica_pids("VisionEncoder"))
    load = Load(server, mixed, 6)
    with load.running():
        ray_serve.run(serve.build_app(dataclasses.replace(config, deadline_s=100.0)), name=serve.APP)
        until(lambda: all(n == 1 for n in replicas().values()), 60, "the end of the old replicas")
        updated = set(replica_pids("Decoder") + replica_pids("VisionEncoder"))
        good = load.outcomes.total()
        with pytest.raises(Exception, match="does not exist"):
            serve.build_app(dataclasses.replace(config, model=str(tmp_path / "nothing")))
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "config.json").write_bytes((Path(config.model) / "config.json").read_bytes())
        with pytest.raises(RuntimeError, match=r"[Ff]ail"):
            ray_serve.run(serve.build_app(dataclasses.replace(config, model=str(broken))), name=serve.APP)
        time.sleep(5)
    print(f"\n{good} requests in the good update, then {load.outcomes.total() - good} in the broken: {dict(load.outcomes)}")
    assert not before & updated
    assert set(load.outcomes) == {"answered"}
    ray_serve.run(serve.build_app(config), name=serve.APP)


def test_the_job_lets_requests_end_when_told_to_stop(a3: Path) -> None:
    port = free_ports(1)[0]
    command = [
        sys.executable,
        "jobs/serve.py",
        "--model",
        str(a3),
        "--name",
        "tiny",
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("serving tiny at")
            url, request = f"http://127.0.0.1:{port}", json.dumps(text_only(1, max_tokens=900)).encode()
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(http, f"{url}/v1/chat/completions", request)
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                with pytest.raises(OSError, match="refused"):
                    http(f"{url}/health")
                assert not asked.done(), "the request ended before the server was told to stop"
                assert asked.result()[0] == 200
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_deployed_on_a_cluster_then_as_a_submitted_job(a3: Path, tmp_path: Path) -> None:
    """`serve deploy jobs/serve.yaml` and `ray job submit -- python jobs/serve.py`, one after the other."""
    port = free_ports(1)[0]
    url = f"http://127.0.0.1:{port}"
    described = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())
    described["http_options"]["port"] = port
    described["applications"][0]["args"] |= {"model": str(a3), "name": "tiny", "dtype": "float32"}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(described))
    asked = json.dumps(with_image(1)).encode()

    def ready() -> bool:
        try:
            return http(f"{url}/ready")[0] == 200
        except OSError:  # nothing listens yet
            return False

    def answers() -> None:
        deadline = time.monotonic() + 150
        while not ready():
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.5)
        status, _, text = http(f"{url}/v1/chat/completions", asked, timeout=60)
        assert status == 200, text
        assert json.loads(text)["choices"][0]["finish_reason"]

    with rayjobs.environment({"PYTHONPATH": str(ROOT)}), local_cluster(tmp_path / "ray.log", num_cpus=8) as cluster:

        def command(*words: str) -> None:
            subprocess.run(
                [*words, "--address", cluster.dashboard], env=dict(cluster.env), cwd=ROOT, check=True, timeout=200
            )

        command("serve", "deploy", str(tmp_path / "serve.yaml"))
        answers()
        command("serve", "shutdown", "--yes")
        client = rayjobs.client_of(cluster)
        flags = f"--model {a3} --name tiny --port {port} --dtype float32"
        job = rayjobs.Job(client, client.submit_job(entrypoint=f"cd {ROOT} && exec python jobs/serve.py {flags}"))
        answers()
        job.stop()
        assert job.wait(100) == JobStatus.STOPPED
        assert not ready()
    print("\ndeployed, then submitted as a job and stopped: both answered")


def test_ten_thousand_malformed_requests(server: str, tmp_path: Path) -> None:
    """By schemathesis, in an environment of its own: its pytest plugins would load into every other test."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs")
    operation = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"default": {"description": "anything but 5xx"}},
    }
    description = {
        "openapi": "3.1.0",
        "info": {"title": "A3", "version": "1"},
        "components": {"schemas": parts},
        "paths": {"/v1/chat/completions": {"post": operation}},
    }
    (tmp_path / "api.json").write_text(json.dumps(description))
    report = tmp_path / "report.json"
    options = {
        "url": server,
        "mode": "negative",
        "max-examples": "10000",
        "phases": "fuzzing",
        "seed": "1",
        "checks": "not_a_server_error",
        "suppress-health-check": "all",
        "header": f"Authorization: Bearer {KEY}",
        "report": "json",
        "report-json-path": str(report),
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    command = [str(ROOT / ".venv-fuzz" / "bin" / "schemathesis"), "run", str(tmp_path / "api.json"), "--continue-on-failure"]
    done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True)
    cases = json.loads(report.read_text())["test_cases"]
    print(f"\nschemathesis: {cases}")
    assert done.returncode == 0, done.stdout[-3000:]
    assert cases["generated"] >= 10_000
    assert cases["with_failures"] == cases["errored"] == 0
