"""What stands before the server's routes: API keys, and the size and pace of bodies."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from fastapi.responses import JSONResponse, Response

from pipelines.openai import ApiError

#: Routes that need no key.
OPEN_PATHS: Final = frozenset({"/health", "/ready"})


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def error_response(error: ApiError, **headers: str) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers() | headers)


class Keys:
    """API keys, known by their sha256."""

    def __init__(self, hashes: Sequence[str]) -> None:
        self.hashes = [bytes.fromhex(h) for h in hashes]

    def check(self, path: str, header: bytes) -> None:
        """Raises ApiError unless the path is open or the Authorization header holds a key.

        Bearer for programs; Basic, with the key as the password, lets a browser ask for it and open the page.
        """
        if not self.hashes or path in OPEN_PATHS:
            return
        scheme, _, key = header.partition(b" ")
        key = key.strip()
        if scheme.lower() == b"basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                key = b""
        elif scheme.lower() != b"bearer":
            key = b""
        given = hashlib.sha256(key).digest()
        # every hash is compared, so that time tells nothing
        matches = [hmac.compare_digest(given, known) for known in self.hashes]
        if not any(matches):
            raise ApiError(401, "the API key is missing or not one of this server's", code="invalid_api_key")


class Guard:
    """ASGI middleware: keys, size and pace of bodies, before anything reads them."""

    def __init__(self, app: Any, keys: Keys, max_body_bytes: int, body_timeout_s: float) -> None:
        self.app, self.keys, self.max_body_bytes, self.body_timeout_s = app, keys, max_body_bytes, body_timeout_s

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            client = scope.get("client")
            if not self.keys.hashes and client and not is_loopback(client[0]):
                # A YAML file may bind what it likes, after the configuration was checked.
                raise ApiError(401, "this server has no API keys and so answers this machine only")
            self.keys.check(scope["path"], headers.get(b"authorization", b""))
            if int(headers.get(b"content-length", b"0")) > self.max_body_bytes:
                raise self._too_large()
            body = await self._body(receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        except ValueError:
            await error_response(ApiError(400, "the Content-Length is not a number"))(scope, receive, send)
            return
        first = True

        async def replay() -> Any:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive: Callable[[], Awaitable[Any]]) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before its request was complete")
                    body += message.get("body", b"")
                    if len(body) > self.max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {self.body_timeout_s:g} s") from error

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body_bytes} bytes")
