"""The front: slow, idle, large and hostile clients are closed; whole requests pass; answers stream; leaving is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from artemis_vlm import RunError
from pipelines.door import Door, Doors
from pipelines.front import Front, FrontConfig, Refusal

LIMITS = FrontConfig(
    head_timeout_s=0.3,
    body_timeout_s=0.3,
    idle_timeout_s=0.3,
    write_timeout_s=0.3,
    max_head_bytes=4096,
    max_body_bytes=10_000,
    max_connections=20,
)
POST = b"POST /x?y=1 HTTP/1.1\r\nHost: a\r\nKey: good\r\nContent-Length: 5\r\n\r\nhello"
POST_AND_CLOSE = POST.replace(b"Host: a", b"Host: a\r\nConnection: close")


def refuse(status: int, text: str) -> Refusal:
    return Refusal(status, {"error": text}, {"X-Own": "1"})


class Behind:
    """The server behind: remembers requests, streams an answer, notices when it is left."""

    def __init__(self, pieces: int = 2, pause: float = 0.0) -> None:
        self.pieces, self.pause, self.piece = pieces, pause, b"piece"
        self.requests: list[bytes] = []
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Behind: 1\r\n\r\n")
            for _ in range(self.pieces):
                writer.write(b"%x\r\n%s\r\n" % (len(self.piece), self.piece))
                await writer.drain()
                await asyncio.sleep(self.pause)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        except ConnectionError:
            self.left.set()
        finally:
            writer.close()


def run(test: Callable[[int, Behind, Front], Awaitable[None]], behind: dict | None = None) -> None:
    async def main() -> None:
        server = Behind(**(behind or {}))
        upstream = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        address = upstream.sockets[0].getsockname()[:2]

        def check(path: str, headers: dict) -> Refusal | None:
            return None if headers.get(b"key") == b"good" else refuse(401, path)

        front = Front(address, LIMITS, check, refuse)
        await front.bind("127.0.0.1", 0)
        port = front._server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await front.start()
        async with asyncio.timeout(10):
            await test(port, server, front)
        await front.stop()
        upstream.close()

    asyncio.run(main())


async def talk(port: int, data: bytes) -> bytes:
    """Everything the front says until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        answer = await reader.read()
    writer.close()
    return answer


def test_whole_requests_pass_and_connections_are_used_again() -> None:
    async def test(port: int, behind: Behind, front: Front) -> None:
        said = await talk(port, POST + POST.replace(b"hello", b"again"))
        assert said.count(b"HTTP/1.1 200 OK") == 2
        assert said.count(b"x-behind: 1") == 2
        assert said.count(b"piece") == 4
        assert [r[-5:] for r in behind.requests] == [b"hello", b"again"]
        assert behind.requests[0].startswith(b"POST /x?y=1 HTTP/1.1\r\n")

    run(test)


def test_headers_of_one_connection_stay_there() -> None:
    async def test(port: int, behind: Behind, front: Front) -> None:
        chunked = (
            b"POST / HTTP/1.1\r\nHost: a\r\nKey: good\r\nTransfer-Encoding: chunked\r\nX-Request-Disconnect-Disabled: 1\r\n"
        )
        assert b" 200 " in await talk(
            port, chunked + b"Connection: close, x\r\nUpgrade: websocket\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        )
        seen = behind.requests[0].lower()
        assert seen.endswith(b"\r\n\r\nabc")
        for name in (b"transfer-encoding", b"x-request-disconnect-disabled", b"upgrade"):
            assert name not in seen
        assert seen.count(b"content-length: 3") == 1

    run(test)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", b" 408 "),
        (b"POST / HTT", b" 408 "),
        (POST[:-1], b" 408 "),
        (b"POST / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 10_000, b" 431 "),
        (POST.replace(b"Length: 5", b"Length: 10001") + bytes(10_001), b" 413 "),
        (POST.replace(b"good", b"bad"), b" 401 "),
        (b"nonsense\r\n\r\n", b" 400 "),
        (b"POST / HTTP/1.1\r\nKey: good\r\n\r\n", b" 400 "),
        (POST.replace(b"Length: 5", b"Length: 5\r\nContent-Length: 6"), b" 400 "),
        (POST.replace(b"Length: 5", b"Length: -5"), b" 400 "),
        (POST.replace(b"Key:", b"Transfer-Encoding: x\r\nKey:"), b" 501 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b" 40"),
    ],
)  # fmt: skip
def test_what_is_slow_large_or_no_http_is_closed(data: bytes, status: bytes) -> None:
    async def test(port: int, behind: Behind, front: Front) -> None:
        started = time.monotonic()
        said = await talk(port, data)
        assert status in said.split(b"\r\n")[0]
        assert b"connection: close" in said.lower()
        assert time.monotonic() - started < 3
        assert behind.requests == []
        assert front.connections == 0

    run(test)


def test_idle_and_too_many_connections_are_closed() -> None:
    async def test(port: int, behind: Behind, front: Front) -> None:
        open_ = [await asyncio.open_connection("127.0.0.1", port) for _ in range(LIMITS.max_connections)]
        await asyncio.sleep(0.05)
        assert await talk(port, b"") == b"", "one more than the limit is closed at once"
        for reader, _ in open_:
            assert b" 408 " in await reader.read()
        assert front.connections == 0
        for _, writer in open_:
            writer.close()
        assert b" 200 " in await talk(port, POST)

    run(test)


def test_a_client_that_leaves_or_does_not_read_is_left_behind() -> None:
    async def test(port: int, behind: Behind, front: Front) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST)
        await reader.readuntil(b"piece")
        writer.close()
        await asyncio.wait_for(behind.left.wait(), 1)
        behind.left.clear()
        behind.piece, behind.pause = bytes(10**6), 0
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(POST)
        await asyncio.wait_for(behind.left.wait(), 5)
        writer.close()

    run(test, {"pieces": 10_000, "pause": 0.01})


def test_doors_come_before_the_address_and_are_taken_in_turn(tmp_path: Path) -> None:
    async def test(port: int, behind: Behind, front: Front) -> None:
        front.doors = Doors(tmp_path)
        others = [Behind(), Behind()]
        servers = [await asyncio.start_unix_server(b.serve, tmp_path / f"{i}.sock") for i, b in enumerate(others)]
        for _ in range(4):
            assert b" 200 " in await talk(port, POST_AND_CLOSE)
        assert [len(b.requests) for b in (*others, behind)] == [2, 2, 0]
        servers[0].close()
        assert (tmp_path / "0.sock").exists(), "as a killed replica leaves it"
        for _ in range(2):
            assert b" 200 " in await talk(port, POST_AND_CLOSE)
        assert [len(b.requests) for b in (*others, behind)] == [2, 4, 0]
        assert not (tmp_path / "0.sock").exists()
        servers[1].close()
        assert b" 200 " in await talk(port, POST_AND_CLOSE)
        assert len(behind.requests) == 1

    run(test)


def test_a_door_that_closes_before_it_answers_is_left_for_the_next(tmp_path: Path) -> None:
    async def test(port: int, behind: Behind, front: Front) -> None:
        front.doors = Doors(tmp_path)

        async def go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.close()

        server = await asyncio.start_unix_server(go, tmp_path / "0.sock")
        assert b" 200 " in await talk(port, POST_AND_CLOSE)
        assert len(behind.requests) == 1
        server.close()

    run(test)


class Slow:
    """An application that answers after it is told to, and says if it was cancelled."""

    def __init__(self) -> None:
        self.asked, self.go, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"x"
        self.asked.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        await asyncio.sleep(0.1)  # what an application does after its answer is not cut off
        self.go.clear()


def test_a_door_ends_what_was_left_and_waits_for_what_runs(tmp_path: Path) -> None:
    async def main() -> None:
        app = Slow()
        door = Door(tmp_path, app)
        await door.open()
        request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"
        _, writer = await asyncio.open_unix_connection(door.path)
        writer.write(request)
        await app.asked.wait()
        writer.close()
        await app.cancelled.wait()

        app.asked.clear()
        reader, writer = await asyncio.open_unix_connection(door.path)
        writer.write(request)
        await app.asked.wait()
        closing = asyncio.create_task(door.close())
        await asyncio.sleep(0.5)
        assert not door.path.exists()
        assert not closing.done()
        app.go.set()
        assert (await reader.read()).endswith(b"ok")
        writer.close()
        await closing
        assert not app.go.is_set()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_nothing_behind_is_said() -> None:
    async def test(port: int, behind: Behind, front: Front) -> None:
        front.upstream = ("127.0.0.1", 1)
        assert b" 503 " in await talk(port, POST)

    run(test)
    with pytest.raises(RunError, match="above 0"):
        FrontConfig(idle_timeout_s=0)
