"""The state in RUN/server that a server's processes write for `fedferret nodes` and `fedferret status`.

    server.json     by `serve`: what it is doing, where it listens, since when
    nodes.json      by `serve`, every few seconds: which sites are connected
    names.json      by the ServerApp in insecure mode: the names that nodes gave
    limits.json     by the ServerApp: what a site may upload, by the recipe
    messages.jsonl  by the ServerApp: a line for every request and response, and one for each with Flower's framing

Files are written atomically. Reading skips lines that are damaged, such as a last one that a crash cut short; a
damaged JSON file is named.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import read_intact, write_atomically

if TYPE_CHECKING:
    from fedferret.engines.flower import Traffic

FOLDER = "server"  # in the run's folder; `runner.SERVED`
_USUAL = {"what", "time", "client", "round"}
_WHOLE = {"traffic": {"what", "time", "client", "payload_down", "payload_up", "framed_down", "framed_up", "reason"}}
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
    Raises:
        UserError: if the file is damaged.
    """
    return read_json(run / FOLDER / f"{name}.json", "`fedferret serve`")


def read_json(path: Path, writer: str) -> dict[str, Any]:
    """Return the content of a file with a JSON object; {} if it does not exist.

    Args:
        path: the file.
        writer: the command that writes it again, for the message.
    Raises:
        UserError: if the file is damaged.
    """
    if not path.exists():
        return {}
    remedy = f"remove it; {writer} writes it again"
    try:
        return dict(json.loads(read_intact(path, remedy)))
    except RunError as error:
        raise UserError(str(error)) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None


def remove_damaged(run: Path, log: Callable[[str], None]) -> None:
    """Remove the JSON files that cannot be read, for a server that writes them again.

    Args:
        run: the run's folder.
        log: called with a line for each.
    Raises:
        UserError: if something else than a file is in the place of one.
    """
    for name in ("server", "nodes", "names"):
        path = run / FOLDER / f"{name}.json"
        try:
            read(run, name)
        except UserError as error:
            if path.is_dir():
                raise
            log(f"{error}.")
            path.unlink()
    messages = run / FOLDER / "messages.jsonl"
    if messages.exists() and not messages.is_file():
        raise UserError(f"{messages} is no file: remove it; `fedferret serve` writes it again")


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
    """Yield every whole line of ``messages.jsonl``, the oldest first.

    Raises:
        UserError: if the file cannot be read.
    """
    path = run / FOLDER / "messages.jsonl"
    if not (path.exists() or path.is_symlink()):
        return
    try:
        content = read_intact(path, "remove it; `fedferret serve` writes it again")
    except RunError as error:
        raise UserError(str(error)) from None
    for line in content.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and _WHOLE.get(str(event.get("what")), _USUAL) <= event.keys():
            yield event
