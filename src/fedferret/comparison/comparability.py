"""Whether the runs of a grid played the same task: read from their diaries, since settings alone do not prove it.

    all runs      started from the same weights                              SHA-256, the ``start`` event
    of a seed     clients and held-out sets hold the same examples           SHA-256, the ``start`` event
    of a seed     the same clients were sampled in every round they share    the ``round`` events

A file or a folder that changed between two runs, or another version of a package, makes them differ: the run that
differs from most is named, and has no part in the table. The batches follow from the rest: a client's order of
examples is drawn by (seed, round, client) alone, whatever the method, but how many make a batch is a method's own.
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
    """What a run played, in fingerprints."""

    base: str  # SHA-256 of the initial weights
    data: str  # SHA-256 of all examples
    cohorts: str  # a word for every round, from the names of its clients


def task_of(run: Run) -> Task:
    """The task that a diary tells of."""
    cohorts = (hashlib.sha256("\0".join(run.rounds[number].clients).encode()) for number in sorted(run.rounds))
    words = " ".join(cohort.hexdigest()[:12] for cohort in cohorts)
    return Task(str(run.start.get("base")), str(run.start.get("data_fingerprint")), words)


def differing(tasks: Mapping[Cell, Task]) -> dict[Cell, str]:
    """The finished cells that did not play what the others played, each with what is different."""
    found = _unlike(tasks, lambda task: task.base, "started from other weights")
    for seed in sorted({cell.seed for cell in tasks}):
        same_seed = {cell: task for cell, task in tasks.items() if cell.seed == seed}
        found |= _unlike(same_seed, lambda task: task.data, "was played on other data")
        found |= _unlike_cohorts(same_seed)
    return found


def _unlike(tasks: Mapping[Cell, Task], value: Callable[[Task], Hashable], what: str) -> dict[Cell, str]:
    values = {cell: value(task) for cell, task in tasks.items()}
    usual = _most_common(values.values())
    return {
        cell: f"{what} ({str(found)[:12]}… here, {str(usual)[:12]}… in the others)"
        for cell, found in values.items()
        if found != usual
    }


def _unlike_cohorts(tasks: Mapping[Cell, Task]) -> dict[Cell, str]:
    found: dict[Cell, str] = {}
    cohorts = {cell: task.cohorts.split() for cell, task in tasks.items()}
    for number in range(max(map(len, cohorts.values()), default=0)):
        here = {cell: words[number] for cell, words in cohorts.items() if number < len(words)}
        usual = _most_common(here.values())
        for cell, cohort in here.items():
            if cohort != usual:
                found.setdefault(cell, f"sampled other clients than the others in round {number + 1}")
    return found


def _most_common(values: Iterable[Any]) -> Any:
    """The value that most have; of several, the first."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def remarks(cells: Sequence[Cell], statuses: Mapping[Cell, RunStatus]) -> list[str]:
    """What held for all runs of the table, and what was not alike though it may be: batch sizes and threads."""
    seeds = len({cell.seed for cell in cells})
    lines = [
        f"{len(cells)} runs started from the same weights.",
        f"For each of {seeds} seeds they held the same data and sampled the same clients in every round they share.",
    ]
    batches = {cell.row.label: getattr(_training(cell), "batch_size", None) for cell in cells}
    lines.append(
        _alike(
            batches,
            "A client's examples came in the same order, drawn by seed, round and client, in batches of {}.",
            "A client's examples came in the same order, drawn by seed, round and client, but in batches of "
            "different sizes: {}.",
        )
    )
    threads = {cell.name: " and ".join(map(str, sorted(set(statuses[cell].threads)))) or None for cell in cells}
    lines.append(
        _alike(
            threads,
            "Threads of a run: {}.",
            "Runs had different numbers of threads, so that seconds do not compare and sums may differ in their last "
            "bits: {}.",
        )
    )
    return [line for line in lines if line]


def _training(cell: Cell) -> Any:
    return getattr(cell.recipe.algorithm, "training", None)


def _alike(values: Mapping[str, Any], same: str, different: str) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    groups: dict[Any, list[str]] = {}
    for name, value in known.items():
        groups.setdefault(value, []).append(name)
    if len(groups) < 2:
        return same.format(next(iter(groups))) if groups else ""
    return different.format("; ".join(f"{value} ({', '.join(names)})" for value, names in groups.items()))
