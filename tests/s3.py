"""A real server of the S3 protocol on loopback (moto), and a proxy before it that fails as networks and stores do."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest
import s3fs

from pipelines.local import free_ports

#: Errors of the store, a slow answer, a reset before an answer and within one.
KINDS: Final = ("500", "503", "slow", "reset", "cut")


@contextmanager
def moto() -> Iterator[str]:
    """Its address."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"{url}/moto-api/", server)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)


@contextmanager
def bucket(name: str) -> Iterator[dict[str, str]]:
    """A server with one bucket, and this process's environment led to it; yields what other processes need for that."""
    with moto() as url, pytest.MonkeyPatch.context() as patch:
        for variable, value in environment(url).items():
            patch.setenv(variable, value)
        s3fs.S3FileSystem.clear_instance_cache()  # an earlier one would know another endpoint
        s3fs.S3FileSystem().mkdir(name)
        yield environment(url)
        s3fs.S3FileSystem.clear_instance_cache()


def environment(url: str) -> dict[str, str]:
    """What makes every S3 client ask there."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": url, **keys}


class Faulty(BaseHTTPRequestHandler):
    """Hands requests on; some get an error, a slow answer or a reset instead, as a seeded die says."""

    protocol_version = "HTTP/1.1"
    upstream: str
    share: float
    kinds: Sequence[str]
    dice: random.Random
    injected: Counter[str]

    def log_message(self, *_: object) -> None: ...

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.dice.choice(self.kinds) if self.dice.random() < self.share else ""
        if fault:
            self.injected[fault] += 1
        if fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
            self.answer(int(fault), {"Content-Type": "application/xml"}, text)
        elif fault == "reset":
            self.reset()
        else:
            status, headers, answer = self.ask(body)
            self.answer(status, headers, answer, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        reply = connection.getresponse()
        answer = reply.read()
        headers = {
            k: v for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date", "server")
        }
        connection.close()
        return reply.status, headers, answer

    def answer(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        self.send_response(status)
        length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
        for name, value in (
            {k: v for k, v in headers.items() if k.lower() != "content-length"} | {"Content-Length": length}
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut" and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.reset()
            return
        parts = 10 if fault == "slow" else 1
        for part in range(parts):
            self.wfile.write(body[len(body) * part // parts : len(body) * (part + 1) // parts])
            self.wfile.flush()
            if fault == "slow":
                time.sleep(0.05)

    def reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextmanager
def faulty(upstream: str, share: float, kinds: Sequence[str] = KINDS, seed: int = 0) -> Iterator[tuple[str, Counter[str]]]:
    """The proxy's address, and how often it has done what."""
    injected: Counter[str] = Counter()
    fields = {"upstream": upstream.removeprefix("http://"), "share": share, "kinds": kinds, "injected": injected}
    handler = type("Proxy", (Faulty,), fields | {"dice": random.Random(seed)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # resets are meant
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", injected
    finally:
        server.shutdown()
        server.server_close()
