"""Checkpoints: what resuming a run needs beside the log, namely the server state and each client's log version.

    state/run.state        round, server state, versions, checksums of the log's files. Replacing this file atomically
                           completes a round.
    log/                   the records up to that round. Opening removes later records, which a crash left behind.
    state/clients/         private client states, per client and round (``engines/client_store.py``)

The public state has no checkpoint: a node rebuilds it from the log (``core/node.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedferret.core.errors import RunError
from fedferret.core.files import read_intact, write_atomically
from fedferret.core.log import RESTORE, Log, log_files
from fedferret.core.messages import state
from fedferret.core.node import Node
from fedferret.core.rounds import RunState
from fedferret.wire import codec


@state
class Progress:
    """The part of a run that the log does not hold."""

    round: int
    server: Any
    versions: dict[str, int]
    log: dict[str, int]  # the checksum of each file of the log: with another log the run would go on to other weights


def save(folder: Path, run: RunState) -> None:
    """Make the round that a run has reached the one to resume from.

    Args:
        folder: of the run.
        run: after its last round.
    """
    progress = Progress(run.round, run.server, run.versions, run.log.checksums)
    write_atomically(folder / "state" / "run.state", codec.encode(progress))
    run.log.prune()


def saved_round(folder: Path) -> int | None:
    """The last finished round of the run in ``folder``, or None where no run has begun. Raises as ``read``."""
    path = folder / "state" / "run.state"
    if path.exists() or path.is_symlink():
        return read(path).round
    # a crash in round 1 leaves that round's files; later ones were only written after a checkpoint
    if any(version > 1 for _, version in log_files(folder / "log")):
        raise RunError(f"{path} is missing, and {folder / 'log'} holds later rounds: {RESTORE}")
    return None


def read(path: Path) -> Progress:
    """The state in a checkpoint file.

    Raises:
        RunError: if the file is damaged or another version of fedferret wrote it.
    """
    try:
        progress = codec.decode(read_intact(path, RESTORE))
    except codec.OtherVersion as error:
        raise RunError(f"{path} was {error}") from None
    except codec.WireError as error:
        raise RunError(f"{path} is damaged ({error}): {RESTORE}") from None
    if not isinstance(progress, Progress):
        raise RunError(f"{path} holds a {type(progress).__name__} and no checkpoint: {RESTORE}")
    return progress


def resume(folder: Path, node: Node) -> RunState:
    """The run in a folder after its last finished round.

    Args:
        folder: of the run.
        node: at version 0, from the base weights; brought up to date.

    Raises:
        RunError: if a file is missing or damaged, or replaying the log gives other weights than its fingerprints.
    """
    progress = read(folder / "state" / "run.state")
    log = Log.open(folder / "log", progress.round, progress.log)
    node.catch_up(log.since(0))
    return RunState(node, progress.server, log, progress.round, progress.versions)


def read_log(folder: Path) -> Log:
    """The log of the run in a folder, after its last finished round; the folder stays as it is.

    Raises:
        RunError: if a file is missing or damaged.
    """
    progress = read(folder / "state" / "run.state")
    return Log.read(folder / "log", progress.round, progress.log)
