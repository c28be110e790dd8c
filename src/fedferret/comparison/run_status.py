"""The status of a cell of the grid, from its run folder and the record next to it.

runs/ferret-1-bit/seed-1/       the run folder, as `fedferret run` writes it
runs/ferret-1-bit/seed-1.json   the record of the run's processes: last outcome and reason, threads and seconds of each
runs/ferret-1-bit/seed-1.txt    the output of these processes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedferret.comparison.grid import Cell
from fedferret.comparison.worker import Outcome
from fedferret.core.errors import UserError
from fedferret.core.files import inside, read_intact, write_atomically
from fedferret.tracking.summary import read_summary


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    ``waiting``: not begun. ``unfinished``: begun and resumable. ``left out``: finished, but with another task than the
    other runs.
    """

    state: Literal["waiting", "unfinished", "finished", "diverged", "failed", "left out"]
    reason: str = ""
    threads: tuple[int, ...] = ()  # of each process of the run
    seconds: float = 0.0  # wall-clock, loading and reporting included

    @property
    def over(self) -> bool:
        """Whether the run ended. Repeating it would change nothing, or fail in the same way."""
        return self.state not in ("waiting", "unfinished")

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.state, self.reason)))


def run_status(cell: Cell) -> RunStatus:
    """The status of a cell.

    Args:
        cell: of the grid.

    Returns:
        The state with its reason, and the threads and seconds of the run's processes.
    """
    record = _read(cell)
    parts = record.get("parts", [])
    threads, seconds = tuple(part["threads"] for part in parts), sum(part["seconds"] for part in parts)
    summary = read_summary(cell.folder)
    if summary.get("status") == "finished":
        if summary.get("eval_loss") and summary["eval_loss"][-1] is None:
            return RunStatus("diverged", "the held-out loss is not finite", threads, seconds)
        return RunStatus("finished", "", threads, seconds)
    if record.get("outcome") in ("diverged", "failed"):
        return RunStatus(record["outcome"], record.get("reason", ""), threads, seconds)
    return RunStatus("unfinished" if cell.folder.exists() else "waiting", "", threads, seconds)


def record_outcome(cell: Cell, outcome: Outcome, threads: int, seconds: float) -> None:
    """Add one process of a run to the cell's record.

    Args:
        cell: of the run.
        outcome: of the process.
        threads: of the process.
        seconds: of the process, wall-clock.
    """
    part = {"outcome": outcome.outcome, "threads": threads, "seconds": round(seconds, 3)}
    record = {
        "label": cell.row.label,
        "seed": cell.seed,
        "outcome": outcome.outcome,
        "reason": outcome.reason,
        "parts": [*_read(cell).get("parts", []), part],
    }
    write_atomically(record_of(cell), json.dumps(record, indent=2) + "\n")


def record_of(cell: Cell) -> Path:
    """The path of the cell's record.

    Args:
        cell: of the grid.

    Returns:
        A JSON file beside the run's folder; it need not exist.
    """
    return cell.folder.with_name(f"{cell.folder.name}.json")


def output_of(cell: Cell) -> Path:
    """The path of the run's output.

    Args:
        cell: of the grid.

    Returns:
        A text file beside the run's folder; it need not exist.
    """
    return cell.folder.with_name(f"{cell.folder.name}.txt")


def _read(cell: Cell) -> dict[str, Any]:
    path, remedy = record_of(cell), "remove it; only the times and reasons of the run's processes are lost"
    if not path.exists():
        return {}
    content = read_intact(inside(path.parent, path), remedy)
    try:
        record = dict(json.loads(content))
        if all({"threads", "seconds"} <= part.keys() for part in record.get("parts", [])):
            return record
        reason = "a process has no threads or seconds"
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise UserError(f"{path} is damaged ({reason}): {remedy}")
