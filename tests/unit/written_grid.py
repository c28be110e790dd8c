"""A grid of runs with invented figures, written through the interface that runs use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedferret.comparison.commands import gather
from fedferret.comparison.grid import Cell, Grid, resolve
from fedferret.comparison.results import Comparison, RowResult
from fedferret.comparison.run_status import record_outcome
from fedferret.comparison.worker import Outcome
from fedferret.core.files import write_atomically
from fedferret.tracking.environment import write_environment
from fedferret.tracking.events import EventLog, round_fields
from fedferret.tracking.summary import write_summary
from tiny_runs import tiny_tables
from unit.written_run import evaluate, record, start

FEDAVG, FERRET = {"name": "fedavg"}, {"name": "ferret", "preset": "one-bit", "coordinates": 512}
TRAINING = {"learning_rate": 0.1, "steps": 2}


def grid_tables(folder: Path, methods: Mapping[str, Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """A grid of these methods (algorithm tables by label) on the tiny task."""
    tables = tiny_tables(folder, rounds=2, algorithm={"training": TRAINING})
    del tables["seed"], tables["evaluation"]
    tables["algorithm"].pop("name"), tables["algorithm"].pop("coordinates")
    entries = [{"label": label, "algorithm": algorithm} for label, algorithm in methods.items()]
    return {**tables, "seeds": [1, 2], "methods": entries, **changes}


def written_grid(folder: Path, labels: Sequence[str], **changes: Any) -> Grid:
    """A grid in ``folder`` with a row of FedAvg per label, each with another server learning rate."""
    folder.mkdir(exist_ok=True)
    methods = {
        label: {"name": "fedavg", "server_learning_rate": 1 / (number + 1)} for number, label in enumerate(labels)
    }
    return resolve(grid_tables(folder, methods, **changes))


def write_cell(
    cell: Cell,
    losses: Mapping[int, float],
    each: int = 100,
    threads: int = 1,
    cohort: str = "ann",
    accuracies: Mapping[int, float] | None = None,
    means: Mapping[int, float] | None = None,
    **changes: Any,
) -> None:
    """A finished run with these losses by round, ``each`` bytes up and as many down for each of two clients.

    A classifier's run has accuracies by round too, and their ``means`` over clients. ``changes`` are fields of the
    start event.
    """
    log = EventLog(cell.folder)
    write_atomically(cell.folder / "recipe.toml", cell.recipe.to_toml())
    write_environment(cell.folder)
    start(log, **{"seed": cell.seed, "base": "b" * 64, "data_fingerprint": "d" * 64, **changes})
    for number in range(max(losses) + 1):
        if number:
            clients = (cohort, "bob")
            sent = dict.fromkeys(clients, each)
            log.write("round", **round_fields(replace(record(number, clients), bytes_up=sent, bytes_down=sent)))
        if number in losses:
            evaluate(log, number, losses[number], *(each[number] if each else None for each in (accuracies, means)))
    log.write("end", rounds=max(losses))
    write_summary(cell.folder)
    record_outcome(cell, Outcome("finished"), threads, 12.0)


def cell_of(grid: Grid, out: Path, label: str, seed: int) -> Cell:
    """The run of that row and seed."""
    return next(cell for cell in grid.cells(out) if cell.row.label == label and cell.seed == seed)


def save(grid: Grid, folder: Path) -> Path:
    """The grid as a file."""
    path = folder / "grid.toml"
    path.write_text(grid.to_toml())
    return path


LOSSES = {
    ("A", 1): {0: 5.0, 1: 4.0, 2: 3.0},
    ("A", 2): {0: 5.2, 1: 4.4, 2: 3.2},
    ("B", 1): {0: 5.0, 1: 4.5, 2: 4.0},
    ("B", 2): {0: 5.2, 1: 4.5, 2: 3.7},
}
EACH = {"A": 1000, "B": 10}


def written(tmp_path: Path, **changes: Any) -> Comparison:
    """Two methods and two seeds with the losses above; method A sends a hundred times as much."""
    grid = written_grid(tmp_path, ["A", "B"], **changes)
    for (label, seed), losses in LOSSES.items():
        write_cell(cell_of(grid, tmp_path, label, seed), losses, EACH[label])
    return gather(grid, tmp_path)


def rows_by_label(comparison: Comparison) -> dict[str, RowResult]:
    return {row.row.label: row for row in comparison.rows}
