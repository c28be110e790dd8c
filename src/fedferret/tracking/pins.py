"""What the files that a run reads were when it began, in its event log, and whether they still are.

start    files={"data": {"rows.jsonl": SHA-256}, "template": ...}, data_fingerprint=...
resume   the same two, where the run goes on with changed data that its user accepts
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError
from fedferret.data.pinned import DATA, OPTION, Pins, difference
from fedferret.tracking import events


@dataclass
class Pinned:
    """The files that this process reads for a run.

    Attributes:
        files: by kind, SHA-256 by name.
        changed: whether data is not what the run began with.
        accept: whether it may be.
    """

    files: Pins
    changed: bool = False
    accept: bool = False


def known(run: Path) -> dict[str, Any]:
    """What is pinned in a run.

    Args:
        run: the run's folder.

    Returns:
        ``files`` and ``data_fingerprint``, as the newest event has them that states them; {} before the run's start.

    Raises:
        UserError: the event log is damaged.
        RunError: the event log cannot be read.
    """
    found: dict[str, Any] = {}
    for event in events.read_events(run) if (run / events.FILE).exists() else ():
        if event["event"] in ("start", "resume"):
            found |= {name: event[name] for name in ("files", "data_fingerprint") if name in event}
    return found


def changed_files(run: Path, now: Pins) -> dict[str, str]:
    """Which files are others than those that a run began with.

    Args:
        run: the run's folder.
        now: the files as they are.

    Returns:
        By kind, what happened to the first file that changed; {} where nothing did, or an earlier fedferret wrote the
        run.

    Raises:
        UserError: the event log is damaged.
        RunError: the event log cannot be read.
    """
    files = known(run).get("files")
    if not isinstance(files, dict):
        return {}
    kinds = {kind: difference(files.get(kind, {}), now.get(kind, {})) for kind in {*files, *now}}
    return {kind: what for kind, what in kinds.items() if what}


def check_files(run: Path, now: Pinned) -> None:
    """Refuse to go on with other files than a run began with, or note that data has changed.

    Args:
        run: the run's folder.
        now: the files as they are.

    Raises:
        UserError: in one line that names the file.
    """
    changed = changed_files(run, now.files)
    for kind in sorted(changed.keys() - {DATA}):
        raise UserError(
            f"{changed[kind]} since the run in {run} began, which stands on it ({kind}): restore it, or begin another "
            f"run with --out"
        )
    if DATA in changed and not now.accept:
        raise UserError(
            f"{changed[DATA]} since the run in {run} began: restore it, or go on with the data as it is by {OPTION}"
        )
    now.changed |= DATA in changed


def check_data(run: Path, now: Pinned, fingerprint: str, round: int) -> None:
    """Refuse to go on with other examples than a run began with, wherever they come from, or note that they changed.

    Args:
        run: the run's folder.
        now: the files as they are.
        fingerprint: SHA-256 of the examples.
        round: the last that is finished; before the first, nothing was learned of other examples.

    Raises:
        UserError: in one line.
    """
    begun = known(run).get("data_fingerprint", fingerprint)
    if begun != fingerprint and round and not now.accept:
        raise UserError(
            f"the run in {run} began with other examples (SHA-256 {str(begun)[:12]}… then, {fingerprint[:12]}… now): "
            f"give it the data that it began with, or go on with the data as it is by {OPTION}"
        )
    now.changed |= begun != fingerprint
