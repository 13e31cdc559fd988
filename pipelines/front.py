"""A front for strangers: closes slow and idle clients, which the HTTP server behind it would wait for without end.

One request at a time on a connection, read whole within its limits before the server behind sees anything of it; the
answer is passed on as it comes. A client that leaves, or does not read, ends its request there too.

Knows nothing of what is asked: a check of the head, given from outside, decides who may send a body.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h11

from artemis_vlm.errors import RunError
from pipelines.door import Doors

logger = logging.getLogger(__name__)

CHUNK: Final = 64 * 1024
#: Not passed on: they speak of one connection only, or tell Ray Serve to keep working for clients that have left.
DROPPED: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade "
    b"content-length expect x-request-disconnect-disabled".split()
)


@dataclass(frozen=True, slots=True)
class FrontConfig:
    """Bounds of what a client may take: seconds, bytes and connections."""

    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    max_head_bytes: int = 32 * 1024
    max_body_bytes: int = 28 * 1024**2
    max_connections: int = 512

    def __post_init__(self) -> None:
        if min(getattr(self, name) for name in self.__slots__) <= 0:
            raise RunError("limits of the front must be above 0")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer of the front's own."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str]


#: Path and headers (names in lower case) of a request to the reason why it may not go on.
CheckHead = Callable[[str, Mapping[bytes, bytes]], "Refusal | None"]
#: Status and sentence to an answer.
Refuse = Callable[[int, str], Refusal]


class _Left(Exception):
    """The client went, or was too slow to be waited for."""


class _Unanswered(Exception):
    """The server behind ended the connection before it said anything."""


class Front:
    """Listens on one address and passes whole requests to another, or to doors on this machine while there are some."""

    def __init__(
        self,
        upstream: tuple[str, int],
        config: FrontConfig,
        check: CheckHead,
        refuse: Refuse,
        doors: Doors | None = None,
    ) -> None:
        self.upstream, self.config, self.check, self.refuse, self.doors = upstream, config, check, refuse, doors
        self.connections = 0
        self._clients: set[_Client] = set()
        self._stopping = False
        self._server: asyncio.Server | None = None

    async def bind(self, host: str, port: int) -> None:
        """Takes the address, so that a wrong one is told early; nobody can connect before `start`."""
        self._server = await asyncio.start_server(self._serve, host, port, backlog=256, start_serving=False)

    async def start(self) -> None:
        assert self._server is not None
        await self._server.start_serving()

    async def stop(self) -> None:
        """Takes no more connections and closes those that wait between requests; the others end with their answer."""
        assert self._server is not None
        self._stopping = True
        self._server.close()
        for client in self._clients:
            if client.idle:
                client.writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.connections >= self.config.max_connections:
            writer.close()
            return
        self.connections += 1
        client = _Client(reader, writer, self.config)
        try:
            self._clients.add(client)
            while await self._one(client) and not self._stopping:
                pass
        except (_Left, h11.LocalProtocolError, OSError):
            writer.transport.abort()  # there is nobody to tell, and closing would wait for what is not read
        except Exception:
            logger.exception("a connection failed")
        finally:
            self.connections -= 1
            self._clients.discard(client)
            writer.close()

    async def _one(self, client: _Client) -> bool:
        """One request and its answer; whether the connection can take another."""
        request: h11.Request | None = None
        try:
            request = await client.head()
            if request is None:
                return False
            path = request.target.split(b"?")[0].decode("latin-1")
            refusal = self.check(path, dict(request.headers))
            body = b"" if refusal else await client.body()
        except _TooLarge:
            refusal = self.refuse(413, f"the body is larger than {self.config.max_body_bytes} bytes")
        except TimeoutError:
            refusal = self.refuse(408, "the request did not arrive in time")
        except h11.RemoteProtocolError as error:
            refusal = self.refuse(error.error_status_hint, "the request is not HTTP/1.1 as this server reads it")
        if refusal is not None:
            await client.answer(refusal)
            return False
        assert request is not None
        return await self._pass_on(client, request, body)

    async def _pass_on(self, client: _Client, request: h11.Request, body: bytes) -> bool:
        for path in [*(self.doors.paths() if self.doors else []), None]:
            try:
                reader, writer = await self._connect(path)
            except ConnectionRefusedError:  # what a killed replica leaves
                if path is not None:
                    path.unlink(missing_ok=True)
                continue
            except OSError:
                continue
            try:
                await self._ask(reader, writer, client, request, body)
            except _Unanswered:
                continue  # it went meanwhile; nobody has been told anything
            finally:
                writer.close()
            return client.next()
        await client.answer(self.refuse(503, "the server behind this one is not up"))
        return False

    async def _connect(self, path: Path | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if path is None:
            return await asyncio.open_connection(*self.upstream)
        return await asyncio.open_unix_connection(path)

    async def _ask(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client: _Client,
        request: h11.Request,
        body: bytes,
    ) -> None:
        passing = asyncio.ensure_future(_exchange(reader, writer, client, request, body))
        leaving = asyncio.ensure_future(client.watch())
        await asyncio.wait([passing, leaving], return_when=asyncio.FIRST_COMPLETED)
        for task in (passing, leaving):
            task.cancel()
        await asyncio.wait([passing, leaving])
        if passing.cancelled():
            raise _Left
        passing.result()


class _TooLarge(Exception):
    pass


class _Client:
    """One client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, config: FrontConfig) -> None:
        self.reader, self.writer, self.config = reader, writer, config
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=config.max_head_bytes)
        self.first = True
        #: Between two requests.
        self.idle = False

    async def head(self) -> h11.Request | None:
        """The next request's head; None when there is none."""
        self.idle = not self.first
        try:
            async with asyncio.timeout(self.config.head_timeout_s if self.first else self.config.idle_timeout_s):
                event = await self._event()
        except TimeoutError:
            if self.first:
                raise
            return None  # idle between two requests: nothing to say
        finally:
            self.idle = False
        self.first = False
        return event if isinstance(event, h11.Request) else None

    async def body(self) -> bytes:
        body = bytearray()
        if self.http.they_are_waiting_for_100_continue:
            await self.send(h11.InformationalResponse(status_code=100, headers=[]))
        async with asyncio.timeout(self.config.body_timeout_s):
            while not isinstance(event := await self._event(), h11.EndOfMessage):
                if isinstance(event, h11.ConnectionClosed):
                    raise _Left
                assert isinstance(event, h11.Data)
                body += event.data
                if len(body) > self.config.max_body_bytes:
                    raise _TooLarge
        return bytes(body)

    async def _event(self) -> Any:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.reader.read(CHUNK))
        return event

    async def watch(self) -> None:
        """Returns when the client has left; what it sends ahead is kept for the next request."""
        while data := await self.reader.read(CHUNK):
            self.http.receive_data(data)
            if len(self.http.trailing_data[0]) > self.config.max_head_bytes:
                return
        return

    async def send(self, event: Any) -> None:
        self.writer.write(self.http.send(event) or b"")
        try:
            async with asyncio.timeout(self.config.write_timeout_s):
                await self.writer.drain()
        except TimeoutError as error:
            raise _Left from error

    async def answer(self, refusal: Refusal) -> None:
        data = json.dumps(refusal.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Connection": "close"}
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        await self.send(h11.Response(status_code=refusal.status, headers=list((headers | dict(refusal.headers)).items())))
        await self.send(h11.Data(data=data))
        await self.send(h11.EndOfMessage())

    def next(self) -> bool:
        if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
            return False
        self.http.start_next_cycle()
        return True


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: _Client, request: h11.Request, body: bytes
) -> None:
    http = h11.Connection(h11.CLIENT)
    kept = [(name, value) for name, value in request.headers if name not in DROPPED]
    headers = [*kept, (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    writer.write(http.send(h11.Request(method=request.method, target=request.target, headers=headers)) or b"")
    writer.write((http.send(h11.Data(data=body)) or b"") + (http.send(h11.EndOfMessage()) or b""))
    answered = False
    try:
        await writer.drain()
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(CHUNK)
                if not (data or answered):
                    raise _Unanswered
                answered = True
                http.receive_data(data)
            elif isinstance(event, h11.Response):
                fields = [(name, value) for name, value in event.headers if name not in DROPPED - {b"content-length"}]
                await client.send(h11.Response(status_code=event.status_code, headers=fields, reason=event.reason))
            elif isinstance(event, (h11.Data, h11.EndOfMessage)):
                await client.send(h11.Data(data=event.data) if isinstance(event, h11.Data) else h11.EndOfMessage())
                if isinstance(event, h11.EndOfMessage):
                    return
            elif isinstance(event, h11.ConnectionClosed):
                raise _Left
    except ConnectionError as error:
        if answered:
            raise
        raise _Unanswered from error
