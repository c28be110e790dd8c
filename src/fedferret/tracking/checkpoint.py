"""Checkpoints: what resuming a run needs beside the log, namely the server state and each client's log version.

    state/run.state        round, server state, versions. Replacing this file atomically completes a round.
    log/                   the records up to that round. Opening removes later records, which a crash left behind.
    state/clients/         private client states, per client and round (``engines/client_store.py``)

The public state has no checkpoint: a node rebuilds it from the log (``core/node.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedferret.core.errors import RunError
from fedferret.core.files import write_atomically
from fedferret.core.log import Log
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


def save(folder: Path, run: RunState) -> None:
    """Make the round that a run has reached the one to resume from.

    Args:
        folder: of the run.
        run: after its last round.
    """
    progress = Progress(run.round, run.server, run.versions)
    write_atomically(folder / "state" / "run.state", codec.encode(progress))
    run.log.prune()


def saved_round(folder: Path) -> int | None:
    """The last finished round of the run in ``folder``, or None where no run has begun."""
    path = folder / "state" / "run.state"
    return int(read(path).round) if path.exists() else None


def read(path: Path) -> Any:
    """The state in a checkpoint file.

    Raises:
        RunError: if the file is damaged or another version of fedferret wrote it.
    """
    try:
        return codec.decode(path.read_bytes())
    except codec.OtherVersion as error:
        raise RunError(f"{path} was {error}") from None
    except codec.WireError as error:
        raise RunError(
            f"{path} cannot be read ({error}): restore a copy of it, or start again in another folder"
        ) from None


def resume(folder: Path, node: Node) -> RunState:
    """The run in a folder after its last finished round.

    Args:
        folder: of the run.
        node: at version 0, from the base weights; brought up to date.

    Raises:
        RunError: if replaying the log gives other weights than the log's fingerprints.
    """
    progress = read(folder / "state" / "run.state")
    log = Log.open(folder / "log", progress.round)
    node.catch_up(log.since(0))
    return RunState(node, progress.server, log, progress.round, progress.versions)
