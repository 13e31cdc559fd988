"""Fetching for strangers: nothing but public web servers is dialled, and every limit holds. No network: a resolver and a
dialler of the test's own lead every name to servers on loopback."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from artemis_vlm import RunError, SampleError
from pipelines.fetch import FetchConfig, Fetcher, is_public, parse_url

PUBLIC = "93.184.215.14"
JPEG = b"\xff\xd8\xff\xe0 pretend"


def response(body: bytes = JPEG, status: str = "200 OK", **headers: str) -> bytes:
    fields = {"Content-Type": "image/jpeg", "Content-Length": str(len(body))} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    return f"HTTP/1.1 {status}\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in fields.items()) + b"\r\n" + body


class Web:
    """Names, their addresses, and what their servers answer."""

    def __init__(
        self,
        answers: dict[str, bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answers, self.tls = answers, tls
        self.addresses: dict[str, list[list[str]]] = {}
        self.down: set[str] = set()
        self.dialled: list[tuple[str, int, str]] = []
        self.resolved: list[str] = []
        self.requests: list[bytes] = []

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        turns = self.addresses.get(host, [[PUBLIC]])
        return turns.pop(0) if len(turns) > 1 else turns[0]

    async def dial(self, address: str, port: int, tls: ssl.SSLContext | None, host: str):
        self.dialled.append((address, port, host))
        if address in self.down:
            raise ConnectionRefusedError
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=tls, server_hostname=host if tls else None)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head)
        answer = self.answers[head.split(b" ")[1].decode()]
        try:
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except ConnectionError:
            pass  # the client hung up, as it should
        finally:
            writer.close()

    def fetch(self, url: str, trust: ssl.SSLContext | None = None, **config: object) -> bytes:
        async def main() -> bytes:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.tls)
            self.port = server.sockets[0].getsockname()[1]
            fetcher = Fetcher(FetchConfig(**config), self.resolve, self.dial)
            fetcher._tls = trust or fetcher._tls
            try:
                return await fetcher.fetch(url)
            finally:
                server.close()

        return asyncio.run(main())


def refused(web: Web, url: str, says: str, **config: object) -> None:
    with pytest.raises(SampleError, match=says) as error:
        web.fetch(url, **config)
    assert "127.0.0.1" not in str(error.value)


@pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


NOT_PUBLIC = """127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 100.100.100.200 255.255.255.255
    224.0.0.1 239.1.2.3 240.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 192.88.99.1 168.63.129.16
    192.0.0.9 192.0.0.192
    ::1 :: ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 64:ff9b::a9fe:a9fe 64:ff9b:1::a00:1 2002:7f00:1:: 2001::1 2001:db8::1
    fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 ff02::1 3fff::1 5f00::1 2606:4700::5efe:7f00:1
    2606:4700::200:5efe:a00:1 not-an-address"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    web = Web({})
    web.addresses["inside.example"] = [[address]]
    refused(web, "http://inside.example/x.jpg", "host inside.example is not a public web server")
    web.addresses["inside.example"] = [[PUBLIC, address]]
    refused(web, "http://inside.example/x.jpg", "is not a public web server")
    assert web.dialled == []


@pytest.mark.parametrize(
    "url",
    [
        "http://good.example\\@127.0.0.1/",
        "http://good.example@127.0.0.1/",
        "http://user:pass@good.example/",
        "http://good.example:22/",
        "https://good.example:80/",
        "http://good.example:99999/",
        "http://①②⑦.0.0.1/",
        "http://good.example /",
        "http://good.example\t/",
        "http://good.example\r\nHost: inside/",
        "http://good.example/\r\nX: y",
        "http://[::1/",
        "http://[fe80::1%25eth0]/",
        "http://[v1.x]/",
        "http:///x",
        "http:x",
        "//good.example/x",
        "ftp://good.example/x",
        "file:///etc/passwd",
        "gopher://good.example/",
        "javascript:alert(1)",
        "http://-good.example/",
        "http://good%2eexample/",
        "",
    ],
)
def test_urls_that_are_refused_before_anything_is_resolved(url: str) -> None:
    web = Web({})
    with pytest.raises(SampleError, match="the image URL"):
        web.fetch(url)
    assert web.resolved == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "127.0.0.1", "0"])
def test_other_spellings_of_loopback(host: str) -> None:
    """Through the system's resolver, which knows them all and asks no server for any of them."""

    async def dial(*_: object) -> None:
        pytest.fail("it was dialled")

    async def main() -> None:
        await Fetcher(FetchConfig(), dial=dial).fetch(f"http://{host}/x.jpg")

    with pytest.raises(SampleError, match=r"is not a public web server|the connection failed"):
        asyncio.run(main())


@pytest.mark.parametrize("host", ["a..b.example", f"{'a' * 64}.example"])
def test_names_that_no_resolver_asks_for(host: str) -> None:
    with pytest.raises(SampleError, match="the image URL is not a URL"):
        asyncio.run(Fetcher(FetchConfig()).fetch(f"http://{host}/x.jpg"))


def test_slow_names_hold_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(10))

    async def main() -> None:
        fetcher = Fetcher(FetchConfig(timeout_s=0.2))
        urls = [f"http://slow{i}.example/x" for i in range(fetcher.config.concurrency)]
        for error in await asyncio.gather(*map(fetcher.fetch, urls), return_exceptions=True):
            assert "within 0.2 s" in str(error)
        await asyncio.wait_for(asyncio.to_thread(int), 2)

    try:
        asyncio.run(main())
    finally:
        answered.set()


def test_the_checked_address_is_dialled_and_the_name_is_asked_once() -> None:
    """A name that changes its address between check and use gains nothing."""
    web = Web({"/a%20b?c=d": response()})
    web.addresses["rebind.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert web.fetch("http://rebind.example/a%20b?c=d") == JPEG
    assert web.resolved == ["rebind.example"]
    assert web.dialled == [(PUBLIC, 80, "rebind.example")]
    assert b"\r\nHost: rebind.example\r\n" in web.requests[0]


def test_addresses_are_dialled_until_one_answers() -> None:
    web = Web({"/x": response()})
    many = [f"2606:4700::{i}" for i in range(1, 6)]
    web.addresses["a.example"] = [[*many[:2], PUBLIC, "8.8.8.8"]]
    web.down = {*many}
    assert web.fetch("http://a.example/x") == JPEG
    assert [address for address, *_ in web.dialled] == [*many[:2], PUBLIC]
    web.addresses["a.example"], web.dialled = [[*many, PUBLIC]], []
    refused(web, "http://a.example/x", "the connection failed")
    assert [address for address, *_ in web.dialled] == many[:4]


def test_every_redirect_is_checked_anew() -> None:
    to = {"301": "http://b.example/2", "302": "/3", "307": "//c.example/4"}
    hops = [response(b"", f"{code} Moved", Location=where) for code, where in to.items()]
    web = Web({"/1": hops[0], "/2": hops[1], "/3": hops[2], "/4": response()})
    assert web.fetch("http://a.example/1") == JPEG
    assert [host for *_, host in web.dialled] == ["a.example", "b.example", "b.example", "c.example"]
    refused(web, "http://a.example/1", "redirects more than 2 times", max_redirects=2)
    web.addresses["c.example"] = [["169.254.169.254"]]
    refused(web, "http://a.example/1", "host c.example is not a public web server")
    refused(web, "http://a.example/1", "no images from c.example", domains=("a.example", "b.example"))
    web = Web({"/1": response(b"", "302 Found", Location="file:///etc/passwd"), "/2": response(b"", "302 Found")})
    refused(web, "http://a.example/1", "scheme is 'file'")
    refused(web, "http://a.example/2", "redirects to nowhere")
    for where in ("http://[bad/x", "//["):
        web.answers["/1"] = response(b"", "302 Found", Location=where)
        refused(web, "http://a.example/1", "is not a URL: its host, or where it redirects to, is malformed")


def test_domains_and_the_switch() -> None:
    web = Web({"/x": response()})
    for host in ("images.example", "a.images.example", "IMAGES.example."):
        assert web.fetch(f"http://{host}/x", domains=("images.example",)) == JPEG
    for host in ("notimages.example", "images.example.evil.example"):
        refused(web, f"http://{host}/x", f"no images from {host}", domains=("images.example",))
    refused(web, "http://images.example/x", "this server fetches no images", enabled=False)
    with pytest.raises(RunError, match="domains are"):
        FetchConfig(domains=("http://x/",))
    with pytest.raises(RunError, match="above 0"):
        FetchConfig(max_bytes=0)


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1000\r\n" + bytes(4096) + b"\r\n")
        await writer.drain()


async def trickle(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"H")
        await asyncio.sleep(0.02)


async def long_head(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 200 OK\r\nX: " + bytes([120]) * 65536)
        await writer.drain()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (response(Content_Length="2000000"), "larger than 1000000 bytes"),
        (endless, "larger than 1000000 bytes"),
        (trickle, r"within 0\.3 s"),
        (long_head, "the connection failed"),
        (response(Content_Type="text/html"), "media type"),
        (response(Content_Type="image/svg+xml"), "media type"),
        (response(Content_Encoding="gzip"), "compressed body"),
        (response(b"secret", "500 Oops"), "status 500"),
        (response(b"secret", "206 Partial"), "status 206"),
        (response()[:-3], "the connection failed"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "the connection failed"),
        (b"", "the connection failed"),
    ],
)
def test_limits_and_types(answer: object, says: str) -> None:
    refused(Web({"/x": answer}), "http://a.example/x", says, max_bytes=1_000_000, timeout_s=0.3)


def test_octets_and_absent_lengths_are_taken() -> None:
    web = Web({"/x": b"HTTP/1.1 200 OK\r\nContent-Type: binary/octet-stream; x=y\r\n\r\n" + JPEG})
    assert web.fetch("http://a.example/x") == JPEG


def test_tls_is_checked_against_the_name(tmp_path: Path) -> None:
    server, trust = certificates(tmp_path, "good.example")
    web = Web({"/x": response(), "/down": response(b"", "302 Found", Location="http://good.example/x")}, server)
    assert web.fetch("https://good.example/x", trust) == JPEG
    assert web.dialled == [(PUBLIC, 443, "good.example")]
    for host, context in (("other.example", trust), ("good.example", None)):
        with pytest.raises(SampleError, match="the connection failed"):
            web.fetch(f"https://{host}/x", context)
    with pytest.raises(SampleError, match="redirects from https to http"):
        web.fetch("https://good.example/down", trust)


def certificates(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context for one name, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / "cert.pem", folder / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem, secret)
    return server, ssl.create_default_context(cafile=str(pem))


def test_urls_keep_their_parts() -> None:
    parts = parse_url("https://a.example/p/q.png?x=1&y=%22#z")
    assert (parts.hostname, parts.path, parts.query) == ("a.example", "/p/q.png", "x=1&y=%22")
    assert parse_url("http://my_bucket.a.example/x").hostname == "my_bucket.a.example"
    with pytest.raises(SampleError, match=r"scheme is 'data'; expected http or https$"):
        parse_url("data:image/png;base64,AAAA")
    assert parse_url("http://[2606:4700::1111]/x").hostname == "2606:4700::1111"
