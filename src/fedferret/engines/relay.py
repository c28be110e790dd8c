"""Frames on a local socket: the protocol between a relay, which has neither model nor data, and the trainer.

A frame is the number of the following bytes (8 bytes, big-endian) and these bytes. A connection has one frame in and
one frame out. Only the standard library is imported, so a relay starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

SOCKET = "trainer.sock"  # in the site's folder
LARGEST = 1 << 35  # bytes of one frame, 32 GiB: a snapshot of 7B weights in fp32, and no more
UNLISTED = "The server: "  # begins the line of a relay's log with what a server says of a site that it does not know
_HEADER = struct.Struct(">Q")
_LONGEST = 100  # bytes of a path that every system accepts as a socket's address
_PIECE = 1 << 20


class FrameError(ConnectionError):
    """A frame that is too long, or that ended before it was whole."""


def call(path: Path | str, message: bytes, timeout: float) -> bytes:
    """Send a message to the process that listens at a socket, and return the reply.

    Args:
        path: of the socket.
        message: bytes.
        timeout: seconds in all.
    Raises:
        TimeoutError: after ``timeout`` seconds.
        OSError: if no process listens, or the other end closes the connection.
    """
    end = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(max(0.001, timeout))
        with address(path) as name:
            connection.connect(name)
        send(connection, message)
        return receive(connection, end=end)


@contextlib.contextmanager
def address(path: Path | str) -> Iterator[str]:
    """Yield an address for binding or reaching a socket at ``path``: the kernel allows about a hundred bytes."""
    path = Path(path)
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def send(connection: socket.socket, content: bytes) -> None:
    """Write one frame.

    Args:
        connection: a connected socket.
        content: bytes of the frame, without the header.
    """
    connection.sendall(_HEADER.pack(len(content)))
    if content:  # after the header of an empty frame the reader may have closed the connection
        connection.sendall(content)


def receive(connection: socket.socket, *, end: float | None = None, largest: int = LARGEST) -> bytes:
    """Read one frame.

    Args:
        connection: a connected socket.
        end: the last moment to wait for the whole frame, in seconds of ``time.monotonic``.
        largest: limit of the frame's size, bytes.
    Returns:
        The frame's bytes, without the header.
    Raises:
        FrameError: if the frame is too large, or incomplete.
        TimeoutError: after ``end``.
    """
    (length,) = _HEADER.unpack(_read(connection, _HEADER.size, end))
    if length > largest:
        raise FrameError(f"a frame of {length:,} bytes was announced, and at most {largest:,} are allowed")
    return _read(connection, length, end)


def _read(connection: socket.socket, length: int, end: float | None) -> bytes:
    content = bytearray()
    while len(content) < length:
        if end is not None:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            connection.settimeout(left)
        # the buffer grows with what is received: a false length takes no memory
        piece = connection.recv(min(_PIECE, length - len(content)))
        if not piece:
            raise FrameError(f"the connection ended after {len(content):,} of {length:,} bytes")
        content += piece
    return bytes(content)
