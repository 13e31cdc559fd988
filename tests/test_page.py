"""The page in a real browser, over the browser's own debugging protocol: pick an image, see text come, stop it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from samples import jpeg

from pipelines import serve

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(autouse=True)
def browser() -> None:
    if BROWSER is None:
        pytest.skip(f"no browser to show the page in: none of {', '.join(NAMES)} is installed, and CHROME names none")


class Browser:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.numbers = socket, itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while (message := await self.socket.receive_json(timeout=20)).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    async def run(self, script: str) -> Any:
        done = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def until(self, script: str) -> None:
        async with asyncio.timeout(20):
            while not await self.run(script):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def tab(folder: Path) -> AsyncIterator[Browser]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    process = subprocess.Popen([BROWSER, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = folder / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not (port_file.exists() and port_file.read_text().count("\n")):
                await asyncio.sleep(0.1)
        port = port_file.read_text().split("\n")[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                page = next(p for p in await answer.json() if p["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Browser(socket)
    finally:
        process.terminate()
        process.wait(20)


@asynccontextmanager
async def site(asked: list[dict[str, Any]]) -> AsyncIterator[str]:
    """The page as the server sends it, over answers that are written here: what is tested is the page alone."""

    async def page(_: web.Request) -> web.Response:
        text = serve.PAGE.read_text().replace("{{MODEL}}", "tiny")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        headers = {"Content-Security-Policy": policy + "img-src blob: data:"}
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def chat(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        prompt = asked[-1]["messages"][0]["content"][-1]["text"]
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for word in ("A ", "<b>red</b> ", "cät "):
            chunk = json.dumps({"choices": [{"delta": {"content": word}}]})
            for piece in (chunk[:20], chunk[20:]):  # events do not come as the network cuts them
                await answer.write((("data: " if piece == chunk[:20] else "") + piece).encode())
                await asyncio.sleep(0.01)
            await answer.write(b"\n\n")
            if prompt == "endless":
                await asyncio.sleep(0.3)
        if prompt == "endless":
            await asyncio.sleep(30)
        last = b'{"error":{"message":"it broke"}}' if prompt == "broken" else b"[DONE]"
        await answer.write(b"data: " + last + b"\n\n")
        return answer

    app = web.Application(client_max_size=10**7)
    app.add_routes([web.get("/", page), web.post("/v1/chat/completions", chat)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    yield f"http://127.0.0.1:{listening._server.sockets[0].getsockname()[1]}/"
    await runner.cleanup()


def test_pick_see_stop_and_copy(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    photo = tmp_path / "a photo's.jpg"
    photo.write_bytes(jpeg())

    async def main() -> None:
        async with site(asked) as url, tab(tmp_path / "profile") as browser:
            await browser.call("Page.navigate", url=url)
            await browser.until("document.readyState === 'complete' && !!document.getElementById('curl')?.textContent")
            document = await browser.call("DOM.getDocument")
            found = await browser.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector="#file")
            await browser.call("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(photo)])
            await browser.until("document.getElementById('state').textContent.endsWith(' s')")
            assert await browser.run("document.getElementById('answer').textContent") == "A <b>red</b> cät "
            assert await browser.run("document.getElementById('picture').naturalWidth") > 0
            sent = asked[-1]["messages"][0]["content"][0]["image_url"]["url"]
            assert base64.b64decode(sent.split(",")[1]) == photo.read_bytes()

            curl = await browser.run("document.getElementById('curl').textContent")
            local = subprocess.run(["bash", "-c", curl.replace("| curl ", "| cat #")], cwd=tmp_path, capture_output=True)
            assert b'"image_url"' in local.stdout
            assert base64.b64encode(photo.read_bytes()) in local.stdout
            assert json.loads(local.stdout) | {"stream": True} == asked[-1], "what the page asks, but for the stream"

            await browser.run("document.getElementById('prompt').value = 'endless'; document.getElementById('send').click()")
            await browser.until("document.getElementById('answer').textContent.includes('red')")
            await browser.run("document.getElementById('stop').click()")
            await browser.until("document.getElementById('state').textContent === 'stopped'")
            assert await browser.run("document.getElementById('stop').disabled")

            await browser.run("document.getElementById('prompt').value = 'broken'; document.getElementById('send').click()")
            await browser.until("document.getElementById('answer').classList.contains('failed')")
            assert "it broke" in await browser.run("document.getElementById('answer').textContent")

    asyncio.run(main())
