"""Images that strangers name by URL, fetched so that they reach nothing but public web servers.

A name is resolved once, every address it has must be public, and the checked addresses themselves are dialled, with the
name in `Host` and in TLS; each redirect goes through the same. Bytes, time, redirects, ports and media types are bounded.
Error texts tell neither addresses nor what a connection said, so that nobody can map a network with them.

Knows nothing of images: `artemis_vlm.image` reads the bytes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from artemis_vlm.errors import RunError, SampleError

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Dial = Callable[[str, int, "ssl.SSLContext | None", str], Awaitable["tuple[asyncio.StreamReader, asyncio.StreamWriter]"]]

PORTS: Final = {"http": 80, "https": 443}
MEDIA_TYPES: Final = frozenset(
    {"image/jpeg", "image/jpg", "image/png", "image/webp", "image/gif", "application/octet-stream", "binary/octet-stream"}
)
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
CHUNK: Final = 64 * 1024
#: Addresses of a name that are dialled before giving up.
ADDRESSES: Final = 4
#: Names that are looked up at once. In threads of their own, which the lookup of a slow name holds long after its fetch
#: has been given up: others' threads would be gone for all else that the process does.
LOOKUPS: Final = ThreadPoolExecutor(32, "lookup")
#: `is_global` of the standard library lets these through, in some releases at least: multicast aside, relays and
#: translators that lead back inside, and cloud platforms' own services at public addresses.
NOT_PUBLIC: Final = tuple(
    ipaddress.ip_network(n)
    for n in (
        "192.0.0.0/24",  # protocol assignments; one was Oracle Cloud's metadata
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's host
        "2002::/16",  # 6to4
        "2001::/23",  # Teredo, ORCHID and other protocol assignments
        "2001:db8::/32",
        "3fff::/20",  # documentation
    )
)
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """What may be fetched.

    enabled: False refuses every URL; data URIs still work
    domains: with their subdomains; empty allows any public host
    """

    enabled: bool = True
    domains: tuple[str, ...] = ()
    max_bytes: int = 20 * 1024**2
    timeout_s: float = 10.0
    max_redirects: int = 3
    concurrency: int = 32

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.timeout_s, self.concurrency) <= 0 or self.max_redirects < 0:
            raise RunError("limits of fetching must be above 0")
        if any(not _HOST.fullmatch(d) for d in self.domains):
            raise RunError(f"domains are {self.domains}; expected names such as example.org")


class Fetcher:
    """Fetches within a configuration. The resolver and the dialler are the system's unless given."""

    def __init__(self, config: FetchConfig, resolve: Resolve | None = None, dial: Dial | None = None) -> None:
        self.config = config
        self._resolve, self._dial = resolve or system_resolve, dial or system_dial
        self._tls = ssl.create_default_context()
        self._turns = asyncio.Semaphore(config.concurrency)

    async def fetch(self, url: str) -> bytes:
        """The body behind an http(s) URL.

        Raises:
            SampleError: not allowed, not reachable, too large, too slow or not an image type.
        """
        if not self.config.enabled:
            raise SampleError("this server fetches no images; send the image as a data URI")
        try:
            async with self._turns, asyncio.timeout(self.config.timeout_s):
                return await self._follow(url)
        except TimeoutError as error:
            raise SampleError(f"the image URL did not answer within {self.config.timeout_s:g} s") from error
        except (OSError, h11.RemoteProtocolError, asyncio.IncompleteReadError) as error:
            raise SampleError("the image URL could not be fetched: the connection failed") from error
        except SampleError:
            raise
        except ValueError as error:  # of the resolver, for labels that no name has, and of joining a redirect
            raise SampleError("the image URL is not a URL: its host, or where it redirects to, is malformed") from error

    async def _follow(self, url: str) -> bytes:
        secure = False
        for _ in range(self.config.max_redirects + 1):
            parts = parse_url(url)
            if secure and parts.scheme == "http":
                raise SampleError("the image URL redirects from https to http")
            secure = parts.scheme == "https"
            found = await self._get(parts)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise SampleError(f"the image URL redirects more than {self.config.max_redirects} times")

    async def _get(self, url: SplitResult) -> bytes | str:
        """The body, or where a redirect leads."""
        host, port = str(url.hostname), PORTS[url.scheme]
        if self.config.domains and not any(_within(host, domain) for domain in self.config.domains):
            raise SampleError(f"this server fetches no images from {host}; send the image as a data URI")
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(is_public, addresses)):
            raise SampleError(f"the image URL's host {host} is not a public web server")
        reader, writer = await self._connect(addresses[:ADDRESSES], port, self._tls if url.scheme == "https" else None, host)
        try:
            return await self._exchange(reader, writer, url)
        finally:
            writer.close()

    async def _connect(
        self, addresses: Sequence[str], port: int, tls: ssl.SSLContext | None, host: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the first that answers: where there is no IPv6, a name's first address may lead nowhere."""
        *others, last = addresses
        for address in others:
            try:
                return await self._dial(address, port, tls, host)
            except OSError:
                continue
        return await self._dial(last, port, tls, host)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, url: SplitResult) -> bytes | str:
        connection = h11.Connection(h11.CLIENT)
        headers = [
            ("Host", f"[{url.hostname}]" if ":" in str(url.hostname) else str(url.hostname)),
            ("User-Agent", "artemis-vlm"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(CHUNK))
            elif isinstance(event, h11.Response):
                if event.status_code in REDIRECTS:
                    return _location(event)
                self._check_response(event)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self.config.max_bytes:
                    raise self._too_large()
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif isinstance(event, h11.ConnectionClosed):
                raise SampleError("the image URL could not be fetched: the connection failed")

    def _check_response(self, response: h11.Response) -> None:
        headers = {name: value.decode("latin-1") for name, value in response.headers}
        if response.status_code != 200:
            raise SampleError(f"the image URL answered with status {response.status_code}")
        media = headers.get(b"content-type", "").split(";")[0].strip().lower()
        if media not in MEDIA_TYPES:
            raise SampleError("the image URL answered with a media type that is not JPEG, PNG, WebP or GIF")
        if headers.get(b"content-encoding", "identity") != "identity":
            raise SampleError("the image URL answered with a compressed body, which was not asked for")
        if int(headers.get(b"content-length", 0)) > self.config.max_bytes:
            raise self._too_large()

    def _too_large(self) -> SampleError:
        return SampleError(f"the image behind the URL is larger than {self.config.max_bytes} bytes")


def parse_url(url: str) -> SplitResult:
    """The parts of an http(s) URL of which no two parsers can think differently.

    Raises:
        SampleError: another scheme, port, user or a host that is not plain ASCII; backslashes, blanks, control characters.
    """
    if not url.isascii() or not url.isprintable() or any(c in url for c in ' \\"<>^`{|}'):
        raise SampleError("the image URL holds characters that a URL may not have unescaped")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SampleError("the image URL is not a URL") from error
    if parts.scheme not in PORTS:
        raise SampleError(f"the image URL's scheme is {parts.scheme[:20]!r}; expected http or https")
    if "@" in parts.netloc or port not in (None, PORTS[parts.scheme]):
        raise SampleError("the image URL names a user or a port; neither is allowed")
    host = parts.hostname or ""
    if "[" in parts.netloc:
        if _address(host) is None:
            raise SampleError("the image URL's host is not an IPv6 address")
    elif not _HOST.fullmatch(host):
        raise SampleError("the image URL's host is not a host name")
    return parts


def is_public(address: str) -> bool:
    """Whether an address as `getaddrinfo` gives it is one of the public internet, and leads to nothing else."""
    found = _address(address)
    if found is None or found.is_multicast or not found.is_global:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        # ISATAP carries an IPv4 address in the last 32 bits, behind 0000:5efe or 0200:5efe
        isatap = int(found) >> 32 & 0xFDFFFFFF == 0x5EFE
        if found not in _GLOBAL_V6 or isatap:
            return False
    return not any(found.version == n.version and found in n for n in NOT_PUBLIC)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if "%" in text:  # a zone: link-local by nature
        return None
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _within(host: str, domain: str) -> bool:
    host, domain = host.lower().rstrip("."), domain.lower().rstrip(".")
    return host == domain or host.endswith(f".{domain}")


def _location(response: h11.Response) -> str:
    for name, value in response.headers:
        if name == b"location":
            return value.decode("latin-1")
    raise SampleError("the image URL redirects to nowhere")


async def system_resolve(host: str, port: int) -> list[str]:
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(LOOKUPS, look_up)
    return [str(sockaddr[0]) for *_, sockaddr in found]


async def system_dial(
    address: str, port: int, tls: ssl.SSLContext | None, host: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(address, port, ssl=tls, server_hostname=host if tls else None)
