"""Checkpoints: what resuming a run needs beside the log, namely the server state and each client's log version.

    state/run.state        round, server state, versions, checksums of the log's files. Replacing this file atomically
                           completes a round.
    state/history/         run.state of the rounds before, for as many rounds as the log keeps (``execution.history``)
    log/                   the records up to that round. Opening removes later records, which a crash left behind.
    state/clients/         private client states, per client and round (``engines/client_store.py``)

``rewinding.py`` goes back to an earlier round.

The public state has no checkpoint: a node rebuilds it from the log (``core/node.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedferret.core.clients import ClientChanges
from fedferret.core.errors import RunError
from fedferret.core.files import build_atomically, read_intact, write_atomically
from fedferret.core.log import RESTORE, Log, log_files
from fedferret.core.messages import state
from fedferret.core.node import Node
from fedferret.core.rounds import RunState
from fedferret.wire import codec


@state
class Progress:
    """The part of a run that the log does not hold."""

    round: int
    server: Any  # of round 0: nothing, the method makes it
    versions: dict[str, int]
    log: dict[str, int]  # the checksum of each file of the log: with another log the run would go on to other weights
    firsts: tuple[int, ...]  # of the log, for the rounds that end with ``round``
    epoch: int  # 0, or when the run was last rewound; see ``rewinding.py``
    retired: tuple[str, ...]  # clients that are sampled no more
    begun_anew: tuple[str, ...] = ()  # after rewinding to here: clients with a private state that was not held
    added: tuple[str, ...] = ()  # clients that came after the run began

    @property
    def changes(self) -> ClientChanges:
        """To the list of clients, since the run began."""
        return ClientChanges(self.added, self.retired)

    @property
    def window(self) -> dict[int, int]:
        """``Log.firsts``: the rounds that can be gone back to, this one among them."""
        return dict(enumerate(self.firsts, start=self.round + 1 - len(self.firsts)))


def save(folder: Path, run: RunState) -> None:
    """Make the round that a run has reached the one to resume from.

    Args:
        folder: of the run.
        run: after its last round.
    """
    path, before = folder / "state" / "run.state", past(folder, run.round - 1)
    epoch, changes = run.node.epoch, {"retired": run.changes.retired, "added": run.changes.added}
    if run.log.history and path.exists():
        build_atomically(before, lambda temporary: shutil.copyfile(path, temporary))
    elif run.log.history and run.round == 1:
        write_atomically(before, codec.encode(Progress(0, None, {}, {}, (1,), epoch, **changes)))
    log = run.log
    firsts = tuple(log.firsts.values())
    progress = Progress(run.round, run.server, run.versions, log.checksums, firsts, epoch, **changes)
    write_atomically(path, codec.encode(progress))
    run.log.prune()
    prune(folder, run.log.firsts)


def prune(folder: Path, window: Collection[int]) -> None:
    """Remove the states of rounds that cannot be gone back to, and of rounds that were rewound.

    Args:
        folder: of the run.
        window: the rounds that can be gone back to; the last of them is in ``run.state``.
    """
    for path in (folder / "state" / "history").glob("*.state"):
        if path.stem.isdecimal() and not min(window) <= int(path.stem) < max(window):
            path.unlink()


def progress(folder: Path) -> Progress | None:
    """The state of the run in ``folder``, or None where no round is finished.

    Args:
        folder: of the run.

    Returns:
        What ``run.state`` holds.

    Raises:
        RunError: as ``read``, and where the file is missing though the log has later rounds.
    """
    path = folder / "state" / "run.state"
    if path.exists() or path.is_symlink():
        return read(path)
    # a crash in round 1 leaves that round's files; later ones were only written after a checkpoint
    if any(version > 1 for _, version in log_files(folder / "log")):
        raise RunError(f"{path} is missing, and {folder / 'log'} holds later rounds: {RESTORE}")
    return None


def saved_round(folder: Path) -> int | None:
    """The last finished round of the run in ``folder``, or None where no run has begun. Raises as ``progress``.

    Args:
        folder: of the run.

    Returns:
        The round, from 0.
    """
    known = progress(folder)
    return None if known is None else known.round


def read(path: Path) -> Progress:
    """The state in a checkpoint file.

    Args:
        path: of ``run.state``, or of one that is kept for rewinding.

    Returns:
        The run's state beside its log.

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


def resume(folder: Path, node: Node, initial: Any = None, history: int = 0) -> RunState:
    """The run in a folder after its last finished round.

    Args:
        folder: of the run.
        node: at version 0, from the base weights; brought up to date.
        initial: the server's own state before round 1, for a run that was rewound to there.
        history: rounds before the last that stay on disk.

    Returns:
        The run's state, with the node at the last finished round.

    Raises:
        RunError: if a file is missing or damaged, or replaying the log gives other weights than its fingerprints.
    """
    known = read(folder / "state" / "run.state")
    log = Log.open(folder / "log", known.round, known.log, known.window, history)
    node.catch_up(log.since(0))
    node.epoch = known.epoch
    server = known.server if known.round else initial
    return RunState(node, server, log, known.round, known.versions, known.changes)


def past(folder: Path, round: int) -> Path:
    """Where the state of an earlier round is kept.

    Args:
        folder: of the run.
        round: before the last.

    Returns:
        The file's path; it need not exist.
    """
    return folder / "state" / "history" / f"{round:06d}.state"


def read_log(folder: Path) -> Log:
    """The log of the run in a folder, after its last finished round; the folder stays as it is.

    Args:
        folder: of the run.

    Returns:
        A log in memory.

    Raises:
        RunError: if a file is missing or damaged.
    """
    known = read(folder / "state" / "run.state")
    return Log.read(folder / "log", known.round, known.log)
