"""``audit.jsonl``: what a site received and sent, a line a message, on disk before the message has an effect.

    {"time": "2026-11-22T19:02:11.031+00:00", "what": "request", "run": "9f86d081884c7d65", "round": 3,
     "client": "ward-7", "payload_bytes": 1411, "framed_bytes": 1723, "version": 2, "data": "c0ffee…",
     "privacy": "none", "note": ""}
    {"time": "2026-11-22T19:02:40.118+00:00", "what": "socket", "up_bytes": 5120, "down_bytes": 9216, "seconds": 60.0}

``what``: "request" came; "ok", "missing" or "refused" went. Payload: of an order, the log's entries; of an answer, the
method's message; framed: the whole letter, as the transport takes it. ``data`` is the SHA-256 of the site's examples;
``privacy`` says what an answer was protected with: "none", for there is nothing of the kind yet. "socket": what crossed
the sockets to the server since the line before, both letters and Flower's polling, written by the forwarder.
The file is the site's own and is never sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "audit.jsonl"


class Audit:
    """Adds lines to the audit file in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def __call__(self, event: Mapping[str, Any]) -> None:
        """One message. Raises OSError where the line cannot be written: then the message has no effect either."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **event}, ensure_ascii=False)
        with self._path.open("ab") as file:
            if file.tell() and not _ends_whole(self._path):  # a crash tore the last line: leave it, and go on below it
                line = "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_audit(folder: Path) -> Iterator[dict[str, Any]]:
    """Every whole line, oldest first; none where there is no file."""
    path = folder / FILE
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # torn by a crash


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
