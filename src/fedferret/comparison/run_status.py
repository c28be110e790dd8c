"""How far a cell of the grid has come: read from its run folder and from the record beside it.

runs/ferret-1-bit/seed-1/       the run, as `fedferret run` leaves it
runs/ferret-1-bit/seed-1.json   how its processes went: outcome and reason of the last, threads and seconds of each
runs/ferret-1-bit/seed-1.txt    what they printed
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedferret.comparison.grid import Cell
from fedferret.comparison.worker import Outcome
from fedferret.core.files import write_atomically
from fedferret.tracking.summary import read_summary


@dataclass(frozen=True)
class RunStatus:
    """``waiting``: not begun; ``unfinished``: stopped on the way, to be gone on with; the others are ends.
    ``left out``: finished, but with another task than the other runs."""

    state: Literal["waiting", "unfinished", "finished", "diverged", "failed", "left out"]
    reason: str = ""
    threads: tuple[int, ...] = ()  # of each process that had a part in the run
    seconds: float = 0.0  # wall-clock, loading and reporting included

    @property
    def over(self) -> bool:
        """Whether playing it again would change nothing, or bring the same failure."""
        return self.state not in ("waiting", "unfinished")

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.state, self.reason)))


def run_status(cell: Cell) -> RunStatus:
    """Of this cell, from its files."""
    record = _read(cell)
    parts = record.get("parts", [])
    threads, seconds = tuple(part["threads"] for part in parts), sum(part["seconds"] for part in parts)
    summary = read_summary(cell.folder)
    if summary.get("status") == "finished":
        if summary["eval_loss"] and summary["eval_loss"][-1] is None:
            return RunStatus("diverged", "the held-out loss is not finite", threads, seconds)
        return RunStatus("finished", "", threads, seconds)
    if record.get("outcome") in ("diverged", "failed"):
        return RunStatus(record["outcome"], record["reason"], threads, seconds)
    return RunStatus("unfinished" if cell.folder.exists() else "waiting", "", threads, seconds)


def note(cell: Cell, outcome: Outcome, threads: int, seconds: float) -> None:
    """Add to the record how one process of the cell's run went."""
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
    """Where the record is."""
    return cell.folder.with_name(f"{cell.folder.name}.json")


def output_of(cell: Cell) -> Path:
    """Where what the run prints is."""
    return cell.folder.with_name(f"{cell.folder.name}.txt")


def _read(cell: Cell) -> dict[str, Any]:
    path = record_of(cell)
    return dict(json.loads(path.read_text())) if path.exists() else {}
