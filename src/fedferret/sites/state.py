"""The state in RUN/server that a server's processes write for `fedferret nodes` and `fedferret status`.

    server.json     by `serve`: what it is doing, where it listens, since when
    nodes.json      by `serve`, every few seconds: which sites are connected
    names.json      by the ServerApp in insecure mode: the names that nodes gave
    limits.json     by the ServerApp: what a site may upload, by the recipe
    messages.jsonl  by the ServerApp: a line for every request and response, and one for each with Flower's framing

Files are written atomically. Reading skips a last line that a crash cut short.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedferret.core.files import write_atomically

if TYPE_CHECKING:
    from fedferret.engines.flower import Traffic

FOLDER = "server"  # in the run's folder; `runner.SERVED`
LIMITS = "limits"


def write(run: Path, name: str, content: Mapping[str, Any]) -> None:
    """Replace a file.

    Args:
        run: the run's folder.
        name: of the file, without ".json".
        content: of the file.
    """
    write_atomically(run / FOLDER / f"{name}.json", json.dumps(content, indent=1))


def read(run: Path, name: str) -> dict[str, Any]:
    """Return the content of a file; {} if it does not exist.

    Args:
        run: the run's folder.
        name: of the file, without ".json".
    """
    path = run / FOLDER / f"{name}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return known


def forget(run: Path, name: str) -> None:
    """Delete a file.

    Args:
        run: the run's folder.
        name: of the file, without ".json".
    """
    (run / FOLDER / f"{name}.json").unlink(missing_ok=True)


class MessageLog:
    """Appends to ``messages.jsonl``."""

    def __init__(self, run: Path) -> None:
        self._path = run / FOLDER / "messages.jsonl"
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("ab") as file:
                file.write(b"\n")  # a crash cut the last line short
        self._newest = 0

    def record(self, event: Mapping[str, Any]) -> None:
        """Append a line for a request that was sent or a response that was received."""
        self._newest = max(self._newest, event["round"])
        self._add(event)

    def traffic(self, traffic: Traffic) -> None:
        """Append a line for a request and its response, with the bytes of Flower's framing."""
        self._add({"what": "traffic", "client": traffic.site, **asdict(traffic)})

    def newest_round(self) -> int:
        """Return the newest round that this process sent a request for; 0 if none."""
        return self._newest

    def _add(self, event: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **event}) + "\n")


def messages(run: Path) -> Iterator[dict[str, Any]]:
    """Yield every line of ``messages.jsonl``, the oldest first."""
    path = run / FOLDER / "messages.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event
