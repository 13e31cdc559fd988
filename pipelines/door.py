"""A second way into an HTTP replica, for the front on its own node: a Unix socket, with no proxy of Ray Serve between.

The proxy is two more hops for each request, and a third for its body: in one run a bare /health took 5.3 ms over it and
0.9 past it. Sockets lie in a folder that only their user can enter; what is in it is open. Each replica puts one there
and takes it away before it ends, so the folder is all that the front needs to know. Where there is none, as on another
node, the proxy still leads everywhere.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import uvicorn

#: Seconds between looks at whether the server is up, and the time that those who have just connected have to be taken.
PAUSE_S: Final = 0.2


class Door:
    """Serves an ASGI application at a socket of its own. A client that leaves ends its request."""

    def __init__(self, folder: Path, app: Any) -> None:
        self.path = folder / f"{uuid.uuid4().hex[:12]}.sock"
        self.app = app
        options: dict[str, Any] = {"lifespan": "off", "log_config": None, "access_log": False, "proxy_headers": False}
        self.server = uvicorn.Server(uvicorn.Config(self._one, uds=str(self.path), interface="asgi3", **options))

    async def open(self) -> None:
        """Returns when it takes requests."""
        self._serving = asyncio.create_task(self.server.serve())
        while not self.server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(PAUSE_S / 10)

    async def close(self) -> None:
        """Takes no more requests, and returns when those that run have ended."""
        self.path.unlink(missing_ok=True)
        await asyncio.sleep(PAUSE_S)
        self.server.should_exit = True
        await self._serving

    async def _one(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        answered = False

        async def listen() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                messages.put_nowait(message)
            messages.put_nowait(message)

        async def answer(message: Any) -> None:
            nonlocal answered
            await send(message)
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        working, leaving = asyncio.ensure_future(self.app(scope, messages.get, answer)), asyncio.ensure_future(listen())
        try:
            await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
            if answered:  # uvicorn calls the end of an answer a disconnect too
                await asyncio.wait([working])
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.wait([working, leaving])
        if not working.cancelled():
            working.result()


class Doors:
    """The sockets in a folder, each in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._turns = itertools.count()

    def paths(self) -> list[Path]:
        """Those there are, the one whose turn it is first."""
        found = sorted(self.folder.glob("*.sock"))
        turn = next(self._turns) % max(1, len(found))
        return found[turn:] + found[:turn]
