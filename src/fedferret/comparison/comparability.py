"""Whether the runs of a grid had the same task, checked in their event logs: equal settings alone do not prove it.

    all runs           started from the same weights                              SHA-256, the ``start`` event
    runs of a seed     clients and held-out sets hold the same examples           SHA-256, the ``start`` event
    runs of a seed     the same clients were sampled in every round they share    the ``round`` events

A file or a folder that changed between two runs, or another version of a package, makes the runs differ. The run that
differs from most is named and left out of the table. The batches need no check: (seed, round, client) alone determine a
client's order of examples, for every method. The batch size is a setting of the method.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedferret.comparison.grid import Cell
from fedferret.comparison.run_status import RunStatus
from fedferret.tracking.events import Run


@dataclass(frozen=True)
class Task:
    """The task of a run, as fingerprints."""

    base: str  # SHA-256 of the initial weights
    data: str  # SHA-256 of all examples
    cohorts: str  # for every round 12 hexadecimal digits of the SHA-256 of the clients' names, separated by spaces


def task_of(run: Run) -> Task:
    """The task of a run.

    Args:
        run: as its event log has it.

    Returns:
        What must be equal in runs that are compared: base, data and cohorts.
    """
    cohorts = (hashlib.sha256("\0".join(run.rounds[number].clients).encode()) for number in sorted(run.rounds))
    digests = " ".join(cohort.hexdigest()[:12] for cohort in cohorts)
    return Task(str(run.start.get("base")), str(run.start.get("data_fingerprint")), digests)


def differing(tasks: Mapping[Cell, Task]) -> dict[Cell, str]:
    """The finished cells with another task than the others, each with the difference.

    Args:
        tasks: of the finished cells.

    Returns:
        One clause per cell; empty where all can be compared.
    """
    found = _differing_values(tasks, lambda task: task.base, "started from other weights")
    for seed in sorted({cell.seed for cell in tasks}):
        same_seed = {cell: task for cell, task in tasks.items() if cell.seed == seed}
        found |= _differing_values(same_seed, lambda task: task.data, "has other data")
        found |= _differing_cohorts(same_seed)
    return found


def _differing_values(tasks: Mapping[Cell, Task], value: Callable[[Task], Hashable], what: str) -> dict[Cell, str]:
    values = {cell: value(task) for cell, task in tasks.items()}
    usual = _most_common(values.values())
    return {
        cell: f"{what} ({str(found)[:12]}… here, {str(usual)[:12]}… in the others)"
        for cell, found in values.items()
        if found != usual
    }


def _differing_cohorts(tasks: Mapping[Cell, Task]) -> dict[Cell, str]:
    found: dict[Cell, str] = {}
    cohorts = {cell: task.cohorts.split() for cell, task in tasks.items()}
    for number in range(max(map(len, cohorts.values()), default=0)):
        here = {cell: digests[number] for cell, digests in cohorts.items() if number < len(digests)}
        usual = _most_common(here.values())
        for cell, cohort in here.items():
            if cohort != usual:
                found.setdefault(cell, f"sampled other clients than the others in round {number + 1}")
    return found


def _most_common(values: Iterable[Any]) -> Any:
    """The most frequent value; of several, the first."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def remarks(cells: Sequence[Cell], statuses: Mapping[Cell, RunStatus]) -> list[str]:
    """What is equal in all runs of the table, and whether batch sizes and numbers of threads differ.

    Args:
        cells: in the table.
        statuses: of these cells.
    Returns:
        Sentences.
    """
    seeds = len({cell.seed for cell in cells})
    lines = [
        f"{len(cells)} runs started from the same weights.",
        f"For each of {seeds} seeds the runs had the same data and sampled the same clients in every round they share.",
    ]
    batches = {cell.row.label: getattr(_training(cell), "batch_size", None) for cell in cells}
    lines.append(
        _equal_or_listed(
            batches,
            "Seed, round and client determined the order of a client's examples. Batch size: {}.",
            "Seed, round and client determined the order of a client's examples. Batch sizes differ: {}.",
        )
    )
    threads = {cell.name: " and ".join(map(str, sorted(set(statuses[cell].threads)))) or None for cell in cells}
    lines.append(
        _equal_or_listed(
            threads,
            "Threads per run: {}.",
            "Numbers of threads differ, so seconds are not comparable and sums may differ in their last bits: {}.",
        )
    )
    return [line for line in lines if line]


def _training(cell: Cell) -> Any:
    return getattr(cell.recipe.algorithm, "training", None)


def _equal_or_listed(values: Mapping[str, Any], same: str, different: str) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    groups: dict[Any, list[str]] = {}
    for name, value in known.items():
        groups.setdefault(value, []).append(name)
    if len(groups) < 2:
        return same.format(next(iter(groups))) if groups else ""
    return different.format("; ".join(f"{value} ({', '.join(names)})" for value, names in groups.items()))
