"""Requests to a server under test, and the processes behind it."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image
from ray import serve

KEY = "a key for tests"


@contextmanager
def cluster(num_cpus: int) -> Iterator[None]:
    """A Ray of this process's own, whose workers find the project and the tests."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:  # workers take their environment from here
        patch.setenv("PYTHONPATH", f"{here.parent}:{here}")
        patch.setenv("RAY_worker_niceness", "0")
        ray.init("local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Says:
    """An application without a model."""

    def __init__(self, text: str) -> None:
        self.text = text

    async def __call__(self, _: Any) -> str:
        return self.text


def picture(seed: int = 0, size: tuple[int, int] = (96, 80)) -> bytes:
    image = Image.effect_mandelbrot(size, (-2 + seed / 10, -1, 1, 1), 40).convert("RGB")
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def turn(text: str, *images: bytes) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": uri(data)}} for data in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def body(**changes: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | changes).encode()


def http(url: str, data: bytes | None = None, timeout: float = 30, **headers: str) -> tuple[int, dict[str, str], bytes]:
    fields = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | headers
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, fields), timeout=timeout) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def ask(client: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    """Through OpenAI's client."""
    defaults = {"model": "tiny", "max_tokens": 12, "temperature": 0, "reasoning_effort": "none"}
    return client.chat.completions.create(messages=messages, **defaults | options)


def replica_pids(deployment: str) -> list[int]:
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if f"#{deployment}#" in a["name"]]
    actors = [ray.get_actor(name, namespace="serve") for name in names]
    return [ray.get(actor.__ray_call__.remote(lambda self: os.getpid())) for actor in actors]
