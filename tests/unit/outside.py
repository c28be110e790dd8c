"""Helpers for tests of the port from outside: certificates of every kind, a stand-in for SuperLink, HTTPS calls."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedferret.core.errors import UserError
from fedferret.sites.credentials import ServerCredentials, read_server
from fedferret.sites.pki import Authority

Pair = tuple[Path, Path]
HOST = "localhost"


def needs_nginx() -> None:
    """Skip a test without nginx; in CI it fails instead."""
    from fedferret.sites.proxy import find_nginx

    try:
        find_nginx()
    except UserError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_address() -> str | None:
    """This machine's address on a network, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only the route is looked up
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if address.startswith("127.") else address


@dataclass(frozen=True)
class Federation:
    """An authority with two valid sites, and certificates that must be refused."""

    authority: Authority
    pairs: dict[str, Pair]

    @property
    def server(self) -> ServerCredentials:
        return read_server(self.authority.folder)

    @property
    def ca(self) -> Path:
        return self.server.authority


def federation(folder: Path) -> Federation:
    long_ago = Authority.create(folder / "pki", [HOST, "127.0.0.1"], clock=_two_years_ago)
    late = long_ago.issue("late").with_suffix("")
    authority = Authority(folder / "pki")
    authority.renew("server")
    stranger = Authority.create(folder / "stranger", [HOST])
    sites = {name: authority.issue(name).with_suffix("") for name in ("ward-7", "ward-8")}
    sites |= {"late": late, "stranger": stranger.issue("ward-7").with_suffix("")}
    pairs = {name: (site / "site.crt", site / "site.key") for name, site in sites.items()}
    pairs["server"] = read_server(authority.folder).proxy
    pairs["stranger's server"] = read_server(stranger.folder).proxy
    return Federation(authority, pairs)


def _two_years_ago() -> datetime:
    return datetime.now(UTC) - timedelta(days=730)


@dataclass
class SuperLink:
    """A server that responds to every call and records it: (method and path, headers, bytes of the body)."""

    port: int
    calls: list[tuple[str, dict[str, str], int]] = field(default_factory=list)


@contextmanager
def superlink(pair: Pair) -> Iterator[SuperLink]:
    """An HTTPS server on loopback that responds to everything with 200 and the path."""
    seen = SuperLink(free_port())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self._body()
            seen.calls.append((f"{self.command} {self.path}", dict(self.headers), len(body)))
            self.send_response(200)
            response = self.path.encode() + b" " + body[:8]
            self.send_header("Content-Length", str(len(response)))
            self.end_headers()
            self.wfile.write(response)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    server = ThreadingHTTPServer(("127.0.0.1", seen.port), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def connection(port: int, ca: Path, pair: Pair | None, adjust: Callable[[ssl.SSLContext], None] | None = None,
               host: str = HOST) -> http.client.HTTPSConnection:  # fmt: skip
    """A connection that trusts ``ca`` and shows ``pair``'s certificate, or none."""
    context = ssl.create_default_context(cafile=str(ca))
    if pair:
        context.load_cert_chain(*pair)
    if adjust:
        adjust(context)
    return http.client.HTTPSConnection(host, port, context=context, timeout=30)


def call(
    port: int, ca: Path, pair: Pair | None, path: str, method: str = "POST", body: bytes = b"", **headers: str
) -> tuple[int, bytes]:
    """Send one request with the path as given; return the response's status and body."""
    line = connection(port, ca, pair)
    try:
        line.putrequest(method, path, skip_accept_encoding=True)
        line.putheader("Content-Length", str(len(body)))
        for name, value in headers.items():
            line.putheader(name.replace("_", "-"), value)
        line.endheaders(body)
        response = line.getresponse()
        return response.status, response.read()
    finally:
        line.close()
