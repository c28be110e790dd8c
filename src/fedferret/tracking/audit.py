"""``audit.jsonl``: what a site received and sent, one line per message, on disk before the message takes effect.

    {"time": "2026-11-22T19:02:11.031+00:00", "what": "request", "run": "9f86d081884c7d65", "round": 3,
     "client": "ward-7", "payload_bytes": 1411, "framed_bytes": 1723, "version": 2, "data": "c0ffee…",
     "privacy": "none", "note": ""}
    {"time": "2026-11-22T19:02:40.118+00:00", "what": "socket", "up_bytes": 5120, "down_bytes": 9216, "seconds": 60.0}

``what``: "request" was received; "done", "missing" or "refused" was sent as the response.
``payload_bytes``: of a request, the log entries; of a response, the method's payload.
``framed_bytes``: the whole message as the transport takes it.
``data``: SHA-256 of the site's examples.
``privacy``: the protection of the response. It is "none", because no protection exists yet.
"socket": bytes that crossed the sockets to the server since the last such line, messages and Flower's polling
included. The forwarder writes these lines.
The file stays at the site and is never sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedferret.core.files import read_intact

FILE = "audit.jsonl"
_MESSAGE = {"what", "time", "round", "framed_bytes"}  # keys of a whole line
_WHOLE = {"socket": {"what", "time", "up_bytes", "down_bytes"}}


class Audit:
    """Appends lines to the audit file in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Append one message.

        Raises:
            OSError: if the line cannot be written. The message then takes no effect either.
        """
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **event}, ensure_ascii=False)
        with self._path.open("ab") as file:
            if file.tell() and not _ends_whole(self._path):  # a crash tore the last line: keep it, and append below it
                line = "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_audit(folder: Path) -> Iterator[dict[str, Any]]:
    """Read a site's audit file.

    Args:
        folder: of the site.

    Yields:
        Every whole line, oldest first; nothing if the file does not exist.

    Raises:
        RunError: the file cannot be read.
    """
    path = folder / FILE
    remedy = "put a file in its place, or remove it; a new one is begun"
    for line in read_intact(path, remedy).splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn by a crash
        if isinstance(event, dict) and _WHOLE.get(str(event.get("what")), _MESSAGE) <= event.keys():
            yield event


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
