"""The forwarder: a process at the site that shows the site's certificate, because Flower's SuperNode cannot show one.

    SuperNode --TLS on loopback--> forwarder --TLS with the site's certificate--> the server's proxy

flwr 1.41 calls through ``httpx.Client(verify=...)`` and has no setting for a client certificate
(``flwr/supercore/protobuf/client.py``). With a node key it requires TLS, so the connection on loopback has TLS too,
with a certificate that the site made (``credentials.loopback``). Each connection is passed on as one connection, byte
by byte. The forwarder reads only the status of the first response, to log when the server refuses the certificate.

``Meter`` counts what crosses the sockets to the server, TLS, HTTP and Flower's polling included, and writes a line to
the site's audit file every minute. Only Linux has these counts.

The forwarder reads certificates again at every connection: renewed ones need no restart. While the server cannot be
reached, calls get "503, close", which Flower tries again. A connection that just ended would look to Flower like a
broken certificate, at which Flower gives up. Imports the standard library only. Ends on SIGTERM or with its parent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import struct
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.tracking.audit import Audit

if TYPE_CHECKING:
    from fedferret.sites.credentials import SiteCredentials

_PIECE = 1 << 16  # bytes
_CONNECTING = 15.0  # seconds to reach the server, handshake included; flwr waits for 30
_CLOSING = 2.0  # seconds for the last bytes of a closing connection
_LOOK = 1.0  # seconds between two checks that the parent process runs
_AUDIT_EVERY = 60.0  # seconds between two audit lines of what crossed the sockets
_TCP_INFO = struct.Struct("128xQ64xQQ")  # linux/tcp.h: tcpi_bytes_received, tcpi_bytes_sent, tcpi_bytes_retrans
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_REFUSED = b"HTTP/1.1 400 "  # nginx's response to a certificate that it refuses

BEGUN = "forwarding"  # the first word of the log, written once the port is open


def command(site: SiteCredentials, address: str, port: int, audit: Path) -> list[str]:
    """Return the forwarder's command, and make the site's loopback certificate where it is missing.

    ``flower-supernode`` then has ``--superlink 127.0.0.1:PORT --root-certificates loopback.crt``.

    Args:
        site: the site's credentials.
        address: of the server, HOST:PORT.
        port: the port on loopback to listen on.
        audit: the folder with the site's ``audit.jsonl``.
    Raises:
        UserError: for an invalid address.
    """
    from fedferret.core.errors import UserError
    from fedferret.sites.credentials import loopback

    host, _, number = address.rpartition(":")
    if not (host and number.isascii() and number.isdigit() and 0 < int(number) < 1 << 16):
        raise UserError(f'"{address}": give the server\'s host name and port, as in fed.example.org:8443')
    loopback(site.folder)
    return [
        sys.executable,
        "-P",
        "-m",
        "fedferret.sites.forwarder",
        str(site.folder),
        host.strip("[]"),
        number,
        str(port),
        str(audit),
    ]


class Meter:
    """Counts the bytes that cross sockets, from the kernel's counters, and writes them to the audit file."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._open: dict[StreamWriter, tuple[socket.socket, int, int]] = {}  # socket, bytes counted up and down
        self._up, self._down, self._written = 0, 0, time.monotonic()  # since the last line

    def add(self, connection: StreamWriter) -> None:
        """Count this connection from now on."""
        if sys.platform == "linux":  # a duplicate: the connection closes its socket before the count is final
            self._open[connection] = (connection.get_extra_info("socket").dup(), 0, 0)

    def remove(self, connection: StreamWriter) -> None:
        """Stop counting a closed connection; until then the duplicate keeps the socket open for the other end."""
        if connection in self._open:
            self._count(connection)
            self._open.pop(connection)[0].close()

    def write(self, after: float = 0.0) -> None:
        """Write a line with the bytes since the last line, if there are any and ``after`` seconds have passed."""
        now = time.monotonic()
        if now - self._written < after:
            return
        for connection in self._open:
            self._count(connection)
        if self._up or self._down:
            line = {"what": "socket", "up_bytes": self._up, "down_bytes": self._down}
            with suppress(OSError):  # a full disk ends no connection; the trainer refuses requests then
                self._audit({**line, "seconds": round(now - self._written, 1)})
        self._up, self._down, self._written = 0, 0, now

    def _count(self, connection: StreamWriter) -> None:
        """Add the bytes since the last count; retransmitted bytes count once."""
        handle, up, down = self._open[connection]
        with suppress(OSError, struct.error):  # kernels before 4.19 have no such counters
            info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            received, sent, again = _TCP_INFO.unpack(info)
            self._up, self._down = self._up + sent - again - up, self._down + received - down
            self._open[connection] = (handle, sent - again, received)


class Forwarder:
    """Passes connections on; logs one line when the server is lost or refuses, and one when it is back."""

    def __init__(self, folder: Path, host: str, port: int, audit: Path) -> None:
        """Create a forwarder.

        Args:
            folder: the site's credentials and its loopback certificate.
            host: of the server's proxy.
            port: of the server's proxy.
            audit: the folder with the site's ``audit.jsonl``.
        """
        self._folder, self._host, self._port = folder, host, port
        self._meter = Meter(Audit(audit))
        self._trouble = ""
        self._open: set[asyncio.Task[None]] = set()  # the event loop has only weak references

    async def serve(self, port: int) -> None:
        """Listen on ``port`` of loopback until SIGTERM, SIGINT or the end of the parent process."""
        stop, loop, parent = asyncio.Event(), asyncio.get_running_loop(), os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        inside.load_cert_chain(self._folder / "loopback.crt", self._folder / "loopback.key")
        server = await asyncio.start_server(self._begin, "127.0.0.1", port, ssl=inside)
        _log(f"{BEGUN} 127.0.0.1:{port} to {self._host}:{self._port}")
        while not stop.is_set() and os.getppid() == parent:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _LOOK)
            self._meter.write(_AUDIT_EVERY)
        self._meter.write()
        server.close()

    def _begin(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.create_task(self._pass(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _pass(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.wait_for(self._reach(), _CONNECTING)
        except (OSError, TimeoutError) as error:  # TLS errors are OSErrors
            self._note(_why(error, self._host, self._port))
            await _turn_away(reader, writer)
            return
        self._meter.add(far_writer)
        await _copy_until_either_ends((reader, writer), (far_reader, far_writer), self._on_response, self._meter.remove)

    def _on_response(self, response: bytes) -> None:
        refused = "refuses this site's certificate: it has expired, was revoked, or another authority signed it"
        self._note(f"{self._host}:{self._port} {refused}" if response.startswith(_REFUSED) else "")

    async def _reach(self) -> tuple[StreamReader, StreamWriter]:
        outside = ssl.create_default_context(cafile=self._folder / "ca.crt")
        outside.load_cert_chain(self._folder / "site.crt", self._folder / "site.key")
        return await asyncio.open_connection(self._host, self._port, ssl=outside)

    def _note(self, trouble: str) -> None:
        if trouble != self._trouble:
            _log(trouble or f"{self._host}:{self._port} can be reached again")
            self._trouble = trouble


async def _copy_until_either_ends(
    near: tuple[StreamReader, StreamWriter],
    far: tuple[StreamReader, StreamWriter],
    on_response: Callable[[bytes], None],
    on_close: Callable[[StreamWriter], None],
) -> None:
    """Copy both ways. ``on_response`` is called with the far side's first bytes, ``on_close`` with the far side before
    it is closed. When one end closes, both are closed: TLS has no half-open connections."""

    async def copy(reader: StreamReader, writer: StreamWriter, on_first: Callable[[bytes], None] | None = None) -> None:
        with suppress(OSError):
            while piece := await reader.read(_PIECE):
                if on_first:
                    on_first(piece)
                    on_first = None
                writer.write(piece)
                await writer.drain()

    ways = [asyncio.create_task(copy(near[0], far[1])), asyncio.create_task(copy(far[0], near[1], on_response))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        try:
            await asyncio.gather(*ways, _close(near[1]), _close(far[1]), return_exceptions=True)
        finally:
            on_close(far[1])


async def _turn_away(reader: StreamReader, writer: StreamWriter) -> None:
    """Respond with 503, and read what is still being sent: a client cut off earlier would not see the response."""
    with suppress(OSError, TimeoutError):
        await reader.read(_PIECE)
        writer.write(_UNAVAILABLE)
        await writer.drain()
        async with asyncio.timeout(_CLOSING):
            while await reader.read(_PIECE):
                pass
    await _close(writer)


async def _close(writer: StreamWriter) -> None:
    writer.close()
    with suppress(OSError, TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), _CLOSING)


def _why(error: Exception, host: str, port: int) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{host}:{port} is not the server that this site's credentials are for: {error.verify_message}"
    reason = (
        os.strerror(error.errno) if isinstance(error, ConnectionError) and error.errno else str(error) or "no response"
    )
    return f"{host}:{port} cannot be reached ({reason}); trying again"


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(
            Forwarder(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[5])).serve(int(sys.argv[4]))
        )
