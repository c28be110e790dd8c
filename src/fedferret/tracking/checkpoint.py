"""What resuming needs beside the log: the server's private memory and each client's last version.

    state/run.state        round, server state, versions: replaced whole, and thereby the moment a round is done
    log/                   the records up to that round (later ones are a crash's; opening removes them)
    state/clients/         private states, per client and round (``engines/client_store.py``)

Public state is never saved apart from the log: it is rebuilt by replaying it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, Task
from fedferret.core.errors import RunError
from fedferret.core.files import write_atomically
from fedferret.core.keys import Key
from fedferret.core.log import Log, Record, Update
from fedferret.core.messages import state
from fedferret.core.pooling import tensors
from fedferret.core.restore import restore_tensors
from fedferret.core.rounds import RunState
from fedferret.wire import codec


@state
class Progress:
    """The part of a run that the log does not hold."""

    round: int
    server: Any
    versions: dict[str, int]


def save(folder: Path, run: RunState) -> None:
    """Make the round that ``run`` has reached the one to resume from."""
    progress = Progress(run.round, run.server, run.versions)
    write_atomically(folder / "state" / "run.state", codec.encode(progress))
    run.log.prune()


def saved_round(folder: Path) -> int | None:
    """The last finished round of the run in ``folder``, or None where no run has begun."""
    path = folder / "state" / "run.state"
    return int(read(path).round) if path.exists() else None


def read(path: Path) -> Any:
    """The state in that file. Raises RunError for a damaged one."""
    try:
        return codec.decode(path.read_bytes())
    except codec.WireError as error:
        raise RunError(f"{path} is damaged ({error}): restore a copy of it, or start again in another folder") from None


def resume(folder: Path, task: Task, algorithm: Algorithm[Any, Any, Any, Any, Any], seed: int) -> RunState:
    """The run in ``folder`` after its last finished round; ``task.model`` must hold the base weights.

    Raises RunError where replaying the log gives other weights than it says.
    """
    progress = read(folder / "state" / "run.state")
    log = Log.open(folder / "log", progress.round)
    public, _ = algorithm.init(task, Key.of(seed, "begin"))
    public = replay(task, algorithm, public, log.since(0))
    return RunState(public, progress.server, log, progress.round, progress.versions)


def replay(task: Task, algorithm: Algorithm[Any, Any, Any, Any, Any], public: Any, update: Update) -> Any:
    """Bring a node's public state up to date with what ``Log.since`` gave it; returns the state to use from now on.

    Raises RunError at the first record whose fingerprint differs.
    """
    if update.snapshot is not None:
        public = restore_tensors(task, codec.decode(update.snapshot))
    for encoded in update.records:
        record: Record = codec.decode(encoded)
        algorithm.apply(task, public, codec.decode(record.entry))
        if record.fingerprint and tree.digest(tensors(public)) != record.fingerprint:
            raise RunError(
                f"version {record.version}: this machine rebuilt other weights than the log says; "
                f"its base model, its fedferret or its memory differs"
            )
    return public
