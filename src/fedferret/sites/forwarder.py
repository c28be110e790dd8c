"""The site's way out: Flower's node can show no client certificate, so this process on the site's machine does.

    SuperNode --TLS on loopback--> forwarder --TLS with the site's certificate--> the server's proxy

flwr 1.41 calls through ``httpx.Client(verify=...)`` and has no setting for a certificate of its own
(``flwr/supercore/protobuf/client.py``), and with a node key it insists on TLS: hence TLS on loopback too, under a
certificate that the site made itself (``credentials.loopback``). Each connection is passed on as one connection, byte
by byte; nothing is read but the status of the first answer, to say in words when the server refuses the certificate.

What crosses the sockets to the server, TLS, HTTP and Flower's polling included, is a line in the site's audit file
every minute (``Meter``); Linux alone says how much that is.

Certificates are read again at every connection: renewed ones serve without a restart. While the server cannot be
reached, calls are answered "503, close", which Flower tries again; a connection that just ended would look to it like a
broken certificate, for which it gives up. Standard library alone; ends when asked to (SIGTERM) or when its starter has.
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
_CLOSING = 2.0  # seconds for the last bytes of a connection that ends
_LOOK = 1.0  # seconds between looks at whether the starter is still there
_TELL = 60.0  # seconds between two lines on what crossed the sockets
_TCP_INFO = struct.Struct("128xQ64xQQ")  # linux/tcp.h: tcpi_bytes_received, tcpi_bytes_sent, tcpi_bytes_retrans
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_REFUSED = b"HTTP/1.1 400 "  # what nginx answers a certificate that it does not take

BEGUN = "forwarding"  # the first word it writes, once the port is open


def command(site: SiteCredentials, address: str, port: int, audit: Path) -> list[str]:
    """The command that forwards loopback's ``port`` to the server's HOST:PORT; the site's folder is made ready for it.

    ``audit``: the folder whose ``audit.jsonl`` is told what crossed the sockets.

    ``flower-supernode`` is then given ``--superlink 127.0.0.1:PORT --root-certificates`` the folder's ``loopback.crt``.
    Raises :class:`UserError` for an address that is none.
    """
    from fedferret.core.errors import UserError
    from fedferret.sites.credentials import loopback

    host, _, number = address.rpartition(":")
    if not (host and number.isascii() and number.isdigit() and 0 < int(number) < 1 << 16):
        raise UserError(f'"{address}": the server\'s name and port are wanted, as in fed.example.org:8443')
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
    """Counts the bytes of connections on their sockets, as the kernel does, and tells the audit file of them."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._open: dict[StreamWriter, tuple[socket.socket, int, int]] = {}  # and what was counted of it, up and down
        self._up, self._down, self._told = 0, 0, time.monotonic()  # since the last line

    def add(self, connection: StreamWriter) -> None:
        """Count this connection from now on."""
        if sys.platform == "linux":  # a handle of our own: the connection's is gone before its count is final
            self._open[connection] = (connection.get_extra_info("socket").dup(), 0, 0)

    def remove(self, connection: StreamWriter) -> None:
        """It was closed: until this is called too, the other end is not told."""
        if connection in self._open:
            self._count(connection)
            self._open.pop(connection)[0].close()

    def tell(self, after: float = 0.0) -> None:
        """A line on what crossed since the last, if that is ``after`` seconds ago; none where nothing did."""
        now = time.monotonic()
        if now - self._told < after:
            return
        for connection in self._open:
            self._count(connection)
        if self._up or self._down:
            line = {"what": "socket", "up_bytes": self._up, "down_bytes": self._down}
            with suppress(OSError):  # a full disk ends no connection; the trainer will refuse to answer for it
                self._audit({**line, "seconds": round(now - self._told, 1)})
        self._up, self._down, self._told = 0, 0, now

    def _count(self, connection: StreamWriter) -> None:
        """Bytes sent and received so far; what the network lost and was sent again counts once."""
        handle, up, down = self._open[connection]
        with suppress(OSError, struct.error):  # a kernel before 4.19 does not say
            info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            received, sent, again = _TCP_INFO.unpack(info)
            self._up, self._down = self._up + sent - again - up, self._down + received - down
            self._open[connection] = (handle, sent - again, received)


class Forwarder:
    """Passes connections on; says in one line when the server is lost or refuses, and when it is back."""

    def __init__(self, folder: Path, host: str, port: int, audit: Path) -> None:
        """``folder``: the site's credentials and its loopback certificate; ``host``, ``port``: the server's proxy;
        ``audit``: the folder of the site's audit file."""
        self._folder, self._host, self._port = folder, host, port
        self._meter = Meter(Audit(audit))
        self._trouble = ""
        self._open: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks only weakly

    async def serve(self, port: int) -> None:
        """Listen on loopback's ``port`` until asked to end."""
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
            self._meter.tell(_TELL)
        self._meter.tell()
        server.close()

    def _begin(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.create_task(self._pass(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _pass(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.wait_for(self._reach(), _CONNECTING)
        except (OSError, TimeoutError) as error:  # those of TLS are OSErrors
            self._note(_why(error, self._host, self._port))
            await _turn_away(reader, writer)
            return
        self._meter.add(far_writer)
        await _copy_until_either_ends((reader, writer), (far_reader, far_writer), self._hear, self._meter.remove)

    def _hear(self, answer: bytes) -> None:
        refused = "refuses this site's certificate: it has expired, was revoked, or another authority signed it"
        self._note(f"{self._host}:{self._port} {refused}" if answer.startswith(_REFUSED) else "")

    async def _reach(self) -> tuple[StreamReader, StreamWriter]:
        outside = ssl.create_default_context(cafile=self._folder / "ca.crt")
        outside.load_cert_chain(self._folder / "site.crt", self._folder / "site.key")
        return await asyncio.open_connection(self._host, self._port, ssl=outside)

    def _note(self, trouble: str) -> None:
        if trouble != self._trouble:
            _log(trouble or f"{self._host}:{self._port} answers again")
            self._trouble = trouble


async def _copy_until_either_ends(
    near: tuple[StreamReader, StreamWriter],
    far: tuple[StreamReader, StreamWriter],
    hear: Callable[[bytes], None],
    over: Callable[[StreamWriter], None],
) -> None:
    """Copy both ways; ``hear`` is given the far side's first words, ``over`` the far side before it is closed. One end
    ends both: TLS has no half connections."""

    async def copy(reader: StreamReader, writer: StreamWriter, hear: Callable[[bytes], None] | None = None) -> None:
        with suppress(OSError):
            while piece := await reader.read(_PIECE):
                if hear:
                    hear(piece)
                    hear = None
                writer.write(piece)
                await writer.drain()

    ways = [asyncio.create_task(copy(near[0], far[1])), asyncio.create_task(copy(far[0], near[1], hear))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        try:
            await asyncio.gather(*ways, _close(near[1]), _close(far[1]), return_exceptions=True)
        finally:
            over(far[1])


async def _turn_away(reader: StreamReader, writer: StreamWriter) -> None:
    """Answer 503, and read what is still being sent: a caller cut off in the middle would not see the answer."""
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
        os.strerror(error.errno) if isinstance(error, ConnectionError) and error.errno else str(error) or "no answer"
    )
    return f"{host}:{port} cannot be reached ({reason}); trying again"


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(
            Forwarder(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[5])).serve(int(sys.argv[4]))
        )
