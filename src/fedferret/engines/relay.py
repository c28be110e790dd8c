"""Frames on a local socket: how a relay, which has no model and no data, reaches the trainer beside it.

A frame is the number of bytes that follow (8 bytes, big-endian) and those bytes; one frame in, one frame out, and
the connection is done. Only the standard library is imported: a relay starts in a fraction of a second.
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
_HEADER = struct.Struct(">Q")
_LONGEST = 100  # bytes of a path that every system takes as a socket's address
_PIECE = 1 << 20


class FrameError(ConnectionError):
    """A frame that is too long, or that ended before it was whole."""


def call(path: Path | str, message: bytes, timeout: float) -> bytes:
    """Send ``message`` to whoever listens at ``path`` and return the reply.

    Raises TimeoutError after ``timeout`` seconds in all, and other OSErrors where nobody listens or the other end dies.
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
    """The name under which a socket at ``path`` can be bound or reached: the kernel takes about a hundred bytes."""
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
    """Write one frame."""
    connection.sendall(_HEADER.pack(len(content)))
    if content:  # an empty frame is its header: whoever read that may have gone already
        connection.sendall(content)


def receive(connection: socket.socket, *, end: float | None = None, largest: int = LARGEST) -> bytes:
    """Read one frame; ``end``, on the monotonic clock, bounds the whole of it. Raises FrameError, TimeoutError."""
    (length,) = _HEADER.unpack(_read(connection, _HEADER.size, end))
    if length > largest:
        raise FrameError(f"a frame of {length:,} bytes was announced, and at most {largest:,} are taken")
    return _read(connection, length, end)


def _read(connection: socket.socket, length: int, end: float | None) -> bytes:
    content = bytearray()
    while len(content) < length:
        if end is not None:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            connection.settimeout(left)
        # grown as it comes: a length that was only claimed takes no memory
        piece = connection.recv(min(_PIECE, length - len(content)))
        if not piece:
            raise FrameError(f"the connection ended after {len(content):,} of {length:,} bytes")
        content += piece
    return bytes(content)
