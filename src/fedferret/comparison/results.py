"""What the runs of a grid measured, row by row: the numbers behind the table and the page.

    curve      after every evaluated round r: loss, Σ_{i≤r} (up_i + down_i) / sampled_i, Σ_{i≤r} seconds_i
    target     given, or untuned − 0.9 (untuned − best): nine tenths of what the best row gained, means over seeds
    budget     bytes of one place in the cohort: the loss after the last evaluated round that kept within it
    figures    of every run; a row has their means and sample deviations over its seeds

A byte is a byte of the encoded messages as the ledger counts them, catching up included. Bytes are of one place in
the cohort, so that grids with other cohorts compare. Seconds are of the rounds, evaluation left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from fedferret.comparison.comparability import Task, task_of
from fedferret.comparison.grid import Cell, Grid, Row
from fedferret.comparison.run_status import RunStatus
from fedferret.tracking.events import Run, headline, read
from fedferret.tracking.summary import read_summary, summarise

SHARE_OF_GAIN = 0.9  # the usual target is this share of the way from the untuned loss to the best one


class Point(NamedTuple):
    """A run after one of its evaluated rounds, or the mean of several runs there."""

    round: float
    loss: float
    bytes: float  # up and down, of one place in the cohort, so far
    seconds: float  # of all rounds so far


@dataclass(frozen=True)
class RunResult:
    """A finished run. ``figures`` are the numbers of the table by their names in comparison.csv; ``scores`` what else
    was measured of the main held-out set at the end, such as ``task-score``."""

    cell: Cell
    curve: tuple[Point, ...]
    figures: dict[str, float]
    scores: dict[str, float]
    task: Task
    imported_runs: Path | None = None  # the folder of another `fedferret compare` that has it; None: this one


@dataclass(frozen=True)
class RowResult:
    """A row of the table. ``missing`` says for every seed that has no part in the means why."""

    row: Row
    runs: tuple[RunResult, ...]
    missing: dict[int, RunStatus]
    mean: dict[str, float] = field(default_factory=dict)
    deviation: dict[str, float] = field(default_factory=dict)  # sample standard deviation; NaN for one run
    pareto_optimal: bool = False  # no row has both fewer bytes and a lower loss

    @property
    def loss(self) -> float:
        """The mean final loss; infinite where no run has one, so that such rows sort last."""
        return self.mean.get("loss", math.inf)

    def curve(self) -> list[Point]:
        """The mean over the runs, after every round that all of them evaluated."""
        return [Point(*map(statistics.fmean, zip(*points, strict=True))) for points in self._points()]

    def band(self) -> list[tuple[float, float]]:
        """The lowest and the highest loss at the curve's points."""
        return [(min(p.loss for p in points), max(p.loss for p in points)) for points in self._points()]

    def _points(self) -> list[tuple[Point, ...]]:
        by_round = [{point.round: point for point in run.curve} for run in self.runs]
        shared = [number for number in (by_round[0] if by_round else {}) if all(number in run for run in by_round)]
        return [tuple(run[number] for run in by_round) for number in shared]


@dataclass(frozen=True)
class Comparison:
    """All that the table and the page tell."""

    grid: Grid
    out: Path
    rows: tuple[RowResult, ...]  # the lowest loss first
    target: float | None
    remarks: tuple[str, ...]  # what held for all runs
    left_out: tuple[str, ...]  # finished runs that played another task

    @property
    def over(self) -> int:
        """Runs that have come to an end, whatever end."""
        return sum(len(row.runs) + sum(now.over for now in row.missing.values()) for row in self.rows)


def measure(cell: Cell) -> RunResult:
    """The curve and the figures of the finished run in this cell's folder, but those that need the target."""
    run = read(cell.folder)
    last = run.evaluations[max(run.evaluations)] if run.evaluations else None
    scores = headline(next(iter(last.results.values()))) if last else {}
    summary, curve = {**read_summary(cell.folder), **summarise(run)}, _curve(run)
    figures = {
        "loss": curve[-1].loss if curve else math.nan,
        "bytes_up": summary["bytes_up_per_client_round"],
        "bytes_down": summary["bytes_down_per_client_round"],
        "bytes": _bytes_by_round(run)[-1] if run.rounds else 0.0,
        "bytes_up_all_clients": summary["bytes_up"],
        "bytes_down_all_clients": summary["bytes_down"],
        "seconds_local": summary["seconds_local"],
        "seconds_overhead": summary["seconds_overhead"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }
    return RunResult(cell, tuple(curve), figures, scores, task_of(run))


def target_of(grid: Grid, runs: Sequence[RunResult]) -> float | None:
    """The loss whose price the table names: the grid's own, or nine tenths of the best row's gain. None: no gain."""
    if grid.target_loss is not None:
        return grid.target_loss
    first: dict[str, list[float]] = {}
    last: dict[str, list[float]] = {}
    for run in runs:
        if run.curve and run.curve[0].round == 0:
            first.setdefault(run.cell.row.label, []).append(run.curve[0].loss)
            last.setdefault(run.cell.row.label, []).append(run.figures["loss"])
    if not first:
        return None
    # the lowest: a prompt that is put before the text makes a model worse before it is tuned
    untuned, best = (min(map(statistics.fmean, losses.values())) for losses in (first, last))
    return untuned - SHARE_OF_GAIN * (untuned - best) if best < untuned else None


def rows_of(
    grid: Grid, runs: Sequence[RunResult], others: Iterable[tuple[Cell, RunStatus]], target: float | None
) -> list[RowResult]:
    """The rows, the lowest loss first; ``others`` are the cells that have no part in the means."""
    missing: dict[str, dict[int, RunStatus]] = {}
    for cell, now in others:
        missing.setdefault(cell.row.label, {})[cell.seed] = now
    rows = []
    for row in grid.rows:
        own = tuple(_with_prices(run, target, grid.budget_bytes) for run in runs if run.cell.row.label == row.label)
        numbers = [{**run.figures, **run.scores} for run in own]
        columns = {name: [each.get(name, math.nan) for each in numbers] for name in (numbers[0] if own else {})}
        # NaN where one is: a mean over the seeds that reached the target alone would flatter
        mean = {name: statistics.fmean(values) for name, values in columns.items()}
        deviation = {name: _deviation(values) for name, values in columns.items()}
        rows.append(RowResult(row, own, missing.get(row.label, {}), mean, deviation))
    rows = [_marked(row, rows) for row in rows]
    return sorted(rows, key=lambda row: row.loss)


def _marked(row: RowResult, rows: Sequence[RowResult]) -> RowResult:
    """The row, told whether it is on the Pareto front of bytes and loss."""
    if not row.runs:
        return row
    here = (row.mean["bytes"], row.mean["loss"])
    places = [(other.mean["bytes"], other.mean["loss"]) for other in rows if other.runs]
    beaten = any(place != here and place[0] <= here[0] and place[1] <= here[1] for place in places)
    return replace(row, pareto_optimal=not beaten)


def _with_prices(run: RunResult, target: float | None, budget: float | None) -> RunResult:
    """The run with what the target cost it and what the budget bought it."""
    reached = next((point for point in run.curve if target is not None and point.loss <= target), None)
    figures = {
        **run.figures,
        "rounds_to_target": reached.round if reached else math.nan,
        "bytes_to_target": reached.bytes if reached else math.nan,
        "seconds_to_target": reached.seconds if reached else math.nan,
    }
    if budget is not None:  # before round 1 nothing has been sent, so there is always such a point
        figures["loss_in_budget"] = [point.loss for point in run.curve if point.bytes <= budget][-1]
    return replace(run, figures=figures)


def _curve(run: Run) -> list[Point]:
    counts = dict(zip([0, *sorted(run.rounds)], [0.0, *_bytes_by_round(run)], strict=True))
    seconds, spent = {0: 0.0}, 0.0
    for number, entry in sorted(run.rounds.items()):
        spent += entry.seconds
        seconds[number] = spent
    return [
        Point(number, entry.loss, counts[number], seconds[number])
        for number, entry in sorted(run.evaluations.items())
        if number in counts
    ]


def _bytes_by_round(run: Run) -> list[float]:
    """Bytes of one place in the cohort, up and down, after every round."""
    total, counts = 0.0, []
    for _, entry in sorted(run.rounds.items()):
        total += (sum(entry.bytes_up.values()) + sum(entry.bytes_down.values())) / max(1, len(entry.clients))
        counts.append(total)
    return counts


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan
