"""Replay protection: requests are numbered, and a site works for each number once, whatever is delivered again.

    server   number = max(last + 1, Unix milliseconds), written down before it is sent: RUN/server/sequence
    site     SITE/request.last     the highest number accepted and the SHA-256 of its request, written before the work
             SITE/response.last    that SHA-256, and the response

    lower number                      refused
    the same number, other bytes      refused
    the same bytes                    the same response, after a restart of the trainer too
    the same bytes, no response yet   the trainer ended in the work: it works again

The milliseconds let a server go on that has the folder of an earlier day. Files are readable by their owner alone, and
on the disk when the function that writes them returns.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import write_atomically
from fedferret.engines.transport import NoSeal, Seal

_LINE = re.compile(rb"([0-9]{1,19}) ([0-9a-f]{64})\n")


class SequenceNumbers:
    """Numbers for requests, each higher than all before it, over restarts too."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """Go on after the last number in a file.

        Args:
            path: of the file; None keeps the last number in memory only.
            clock: seconds since the epoch.

        Raises:
            RunError: the file is damaged.
        """
        self._path, self._clock, self._last = path, clock, 0
        if path and path.exists():
            content = path.read_bytes()
            if not re.fullmatch(rb"[0-9]{1,19}\n", content):
                raise RunError(f"{path} is damaged: delete it, and numbers of requests go on from this machine's clock")
            self._last = int(content)

    def next(self) -> int:
        """Return the next number."""
        self._last = max(self._last + 1, int(self._clock() * 1000))
        if self._path:
            write_atomically(self._path, b"%d\n" % self._last, private=True)
        return self._last


class LastRequest:
    """The newest request that a site accepted, and the response to it."""

    def __init__(self, folder: Path) -> None:
        """Read what the folder holds.

        Args:
            folder: of the site.

        Raises:
            UserError: ``request.last`` is damaged.
        """
        self._request, self._response = folder / "request.last", folder / "response.last"
        self._sequence, self._digest = 0, ""
        if self._request.exists():
            found = _LINE.fullmatch(self._request.read_bytes())
            if not found:
                raise UserError(
                    f"{self._request} is damaged: it holds the number of the last request, and without it an old "
                    f"request could be sent again; delete it if you trust the network until the next round"
                )
            self._sequence, self._digest = int(found[1]), found[2].decode()

    def accept(self, sequence: int, request: bytes) -> bytes | None:
        """Write a new request down, or find the response to one that came before.

        Args:
            sequence: the request's number.
            request: the encoded request.

        Returns:
            The response that these very bytes had; None where the work is to be done.

        Raises:
            RunError: the number is not higher than that of another request.
        """
        digest = hashlib.sha256(request).hexdigest()
        if sequence == self._sequence and digest == self._digest:
            stored = self._response.read_bytes() if self._response.exists() else b""
            return stored[len(digest) :] if stored.startswith(digest.encode()) else None
        if sequence <= self._sequence:
            raise RunError(
                f"request number {sequence} came after number {self._sequence}: it was sent before, or the server's "
                f"clock was set back"
            )
        write_atomically(self._request, f"{sequence} {digest}\n".encode(), private=True)
        self._sequence, self._digest = sequence, digest
        return None

    def keep(self, response: bytes) -> None:
        """Store the encoded response to the request that was accepted last."""
        write_atomically(self._response, self._digest.encode() + response, private=True)


@dataclass(frozen=True)
class Protection:
    """What protects the messages of a server.

    Attributes:
        seal: says who sent a message.
        numbers: of the requests.
    """

    seal: Seal = field(default_factory=NoSeal)
    numbers: SequenceNumbers = field(default_factory=SequenceNumbers)
