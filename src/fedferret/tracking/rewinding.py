"""Rewinding: a run goes back to an earlier round that is still whole on disk, in one step.

    past        run.state and log of the round, read and found whole   ->  the state to go back to, in a new epoch
    rewind      run.state is replaced: one rename, which is the moment when the run is rewound
    log_rewind  the event log learns of it, after a crash too

Before that rename the folder is as it was. After it, files of later rounds are what a crash could have left behind:
whatever opens the folder removes them. The epoch travels with every request, so that sites drop later rounds too. It is
the time at which it began, in seconds, and above the one before: what is rewound now has a higher epoch than all that
was rewound before it, in another copy of the folder too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import inside, write_atomically
from fedferret.core.log import Log
from fedferret.tracking import events
from fedferret.tracking.checkpoint import Progress, past, progress, prune, read
from fedferret.wire import codec


def past_progress(
    folder: Path, now: Progress, round: int, history: int, clock: Callable[[], float] = time.time
) -> Progress:
    """The state to rewind a run to, with every file that it needs read.

    Args:
        folder: of the run.
        now: the state of the run.
        round: to go back to; at most the present one, which discards nothing and begins an epoch.
        history: ``execution.history``, for the message.
        clock: seconds since 1970.

    Returns:
        The state after ``round``, of a new epoch, with the list of clients as it is now.

    Raises:
        UserError: the round is not kept.
        RunError: a file of that round is damaged or missing.
    """
    if round > now.round:
        raise UserError(f"round {round} is not reached yet: this run is at round {now.round}")
    if round not in now.window:
        raise UserError(
            f"round {round} is no longer kept: this run keeps rounds {min(now.window)} to {now.round} "
            f"(execution.history = {history})"
        )
    try:
        then = now if round == now.round else read(inside(folder, past(folder, round)))
        Log.read(folder / "log", round, then.log)  # compares every file with its checksum
    except RunError as error:
        raise RunError(f"round {round} cannot be rebuilt, choose another one: {error}") from None
    firsts = tuple(first for number, first in now.window.items() if number <= round)
    epoch = max(now.epoch + 1, int(clock()))
    return replace(then, firsts=firsts, epoch=epoch, retired=now.retired, added=now.added)


def rewind(folder: Path, then: Progress) -> None:
    """Go back, in one step on disk; then remove what later rounds left.

    Args:
        folder: of the run.
        then: from ``past_progress``.
    """
    write_atomically(folder / "state" / "run.state", codec.encode(then))
    Log.open(folder / "log", then.round, then.log, then.window)
    prune(folder, then.window)


def log_rewind(folder: Path) -> events.Rewind | None:
    """Log that the run was rewound, where the event log does not have it yet.

    Args:
        folder: of the run.

    Returns:
        What was logged; None where there was nothing to log.
    """
    known = progress(folder)
    if known is None or known.epoch == 0:
        return None
    run = events.read(folder)
    if run.epoch >= known.epoch:
        return None
    before = {name for event in events.read_events(folder) for name in event.get("retired", ())}
    retired = [name for name in known.retired if name not in before]
    events.EventLog(folder).write(
        "rewind", round=known.round, epoch=known.epoch, retired=retired, begun_anew=list(known.begun_anew)
    )
    return events.read(folder).rewinds[-1]
