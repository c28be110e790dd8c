"""What a server's processes write down for `fedferret nodes` and `fedferret status`, in RUN/server.

    server.json     `serve`: what it is doing, where it listens, since when
    nodes.json      `serve`, every few seconds: who is connected
    names.json      the ServerApp in insecure mode: what nodes said they are called
    letters.jsonl   the ServerApp: a line for every order and receipt, and for each with Flower's bytes around it

A file is whole or absent; a last line that a crash cut short is left out when read.
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


def write(run: Path, name: str, content: Mapping[str, Any]) -> None:
    """Replace what the file of that name holds."""
    write_atomically(run / FOLDER / f"{name}.json", json.dumps(content, indent=1))


def read(run: Path, name: str) -> dict[str, Any]:
    """What was last written; {} if nothing was."""
    path = run / FOLDER / f"{name}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return known


class MessageLog:
    """The file of letters, by the process that writes it."""

    def __init__(self, run: Path) -> None:
        self._path = run / FOLDER / "letters.jsonl"
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("ab") as file:
                file.write(b"\n")  # a crash cut the last line short
        self._newest = 0

    def message(self, event: Mapping[str, Any]) -> None:
        """An order that was sent or a receipt that came."""
        self._newest = max(self._newest, event["round"])
        self._add(event)

    def traffic(self, traffic: Traffic) -> None:
        """What both cost with Flower's records and headers around them."""
        self._add({"what": "traffic", "client": traffic.site, **asdict(traffic)})

    def rounds(self) -> int:
        """The newest round that this process has sent an order of."""
        return self._newest

    def _add(self, event: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **event}) + "\n")


def messages(run: Path) -> Iterator[dict[str, Any]]:
    """Every line of the file of letters, the oldest first."""
    path = run / FOLDER / "letters.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event
