"""The results of a grid's runs, row by row: the values in the table and the page.

    score      the objective's primary figure on the main held-out set: the loss, or a classifier's accuracy
    curve      after every evaluated round r: score, Σ_{i≤r} (up_i + down_i) / sampled_i, Σ_{i≤r} seconds_i
    target     given, or untuned + 0.9 (best − untuned): nine tenths of the best row's gain, means over seeds
    budget     bytes per sampled client: the score after the last evaluated round within the budget
    figures    of every run; a row has their means and sample standard deviations over the seeds

Bytes are those of the encoded messages as the ledger counts them, catching up included. Totals are per sampled client,
so that grids with other cohort sizes are comparable. Seconds are those of the rounds, without evaluation.
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
from fedferret.tracking.events import Run, read
from fedferret.tracking.figures import compared
from fedferret.tracking.summary import read_summary, summarise

OVER_CLIENTS = ("client-mean", "worst-tenth", "deviation")  # each client's model on what the client holds out
TARGET_GAIN = 0.9  # the default target is this share of the best row's gain


class Point(NamedTuple):
    """A run after an evaluated round, or the mean of several runs after that round."""

    round: float
    loss: float  # nats per token
    bytes: float  # up and down, per sampled client, summed over the rounds so far
    seconds: float  # of all rounds so far
    score: float  # the objective's primary figure; the loss of a language model


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    cell: Cell
    curve: tuple[Point, ...]
    figures: dict[str, float]  # by their column in comparison.csv
    scores: dict[str, float]  # extra metrics of the main held-out set at the end, such as ``task-score``
    task: Task
    imported_from: Path | None = None  # another comparison folder; None for a run of this one


@dataclass(frozen=True)
class RowResult:
    """A row of the table."""

    row: Row
    runs: tuple[RunResult, ...]
    missing: dict[int, RunStatus]  # by seed: the runs that the means leave out
    mean: dict[str, float] = field(default_factory=dict)
    deviation: dict[str, float] = field(default_factory=dict)  # sample standard deviation; NaN for one run
    pareto_optimal: bool = False  # no row has both fewer bytes and a better score

    @property
    def score(self) -> float:
        """The mean final score; NaN without a run."""
        return self.mean.get("score", math.nan)

    def curve(self) -> list[Point]:
        """The mean over the runs, after every round that all runs evaluated.

        Returns:
            Points in the order of rounds; empty without runs.
        """
        return [Point(*map(statistics.fmean, zip(*points, strict=True))) for points in self._points()]

    def band(self) -> list[tuple[float, float]]:
        """The lowest and the highest score at the curve's points.

        Returns:
            Pairs, one per point of ``curve``.
        """
        return [(min(p.score for p in points), max(p.score for p in points)) for points in self._points()]

    def _points(self) -> list[tuple[Point, ...]]:
        by_round = [{point.round: point for point in run.curve} for run in self.runs]
        shared = [number for number in (by_round[0] if by_round else {}) if all(number in run for run in by_round)]
        return [tuple(run[number] for run in by_round) for number in shared]


@dataclass(frozen=True)
class Comparison:
    """The content of the table and the page."""

    grid: Grid
    out: Path
    rows: tuple[RowResult, ...]  # the best score first
    target: float | None
    remarks: tuple[str, ...]  # what is equal in all runs
    left_out: tuple[str, ...]  # finished runs of another task

    @property
    def over(self) -> int:
        """The number of runs that ended: finished, diverged, failed or left out."""
        return sum(len(row.runs) + sum(status.over for status in row.missing.values()) for row in self.rows)


def result_of(cell: Cell, grid: Grid) -> RunResult:
    """The curve and the figures of the finished run in a cell's folder, without those that need the target.

    Args:
        cell: with a finished run in its folder.
        grid: of the cell. Where other rows have a global model and this one has none, its clients' own models have no
            figures on the global held-out set: those are NaN.

    Returns:
        The run's result.

    Raises:
        UserError: if the event log cannot be read.
    """
    run = read(cell.folder)
    last = run.evaluations[max(run.evaluations)] if run.evaluations else None
    scores = compared(next(iter(last.results.values()))) if last else {}
    own = grid.mixed and not cell.recipe.algorithm.has_global_model  # other figures are not of the same examples
    scores = {name: math.nan if own and name not in OVER_CLIENTS else each for name, each in scores.items()}
    scores |= _local_only(run)
    summary, curve = {**read_summary(cell.folder), **summarise(run)}, _curve(run, grid.figure, own)
    figures = {
        "loss": curve[-1].loss if curve and not own else math.nan,
        "score": curve[-1].score if curve else math.nan,
        "bytes_up": summary["bytes_up_per_client_round"],
        "bytes_down": summary["bytes_down_per_client_round"],
        "bytes": _bytes_by_round(run)[-1] if run.rounds else 0.0,
        "bytes_up_all_clients": summary["bytes_up"],
        "bytes_down_all_clients": summary["bytes_down"],
        "seconds_local": summary["seconds_local"],
        "seconds_overhead": summary["seconds_overhead"],
        "peak_memory_bytes": summary.get("peak_memory_bytes", math.nan),
    }
    return RunResult(cell, tuple(curve), figures, scores, task_of(run))


def target_of(grid: Grid, runs: Sequence[RunResult]) -> float | None:
    """The target score: the grid's, or the untuned score and nine tenths of the best row's gain.

    Args:
        grid: resolved.
        runs: finished.
    Returns:
        A value of the grid's figure; None if no row gained anything.
    """
    if grid.target is not None:
        return grid.target
    first: dict[str, list[float]] = {}
    last: dict[str, list[float]] = {}
    for run in runs:
        if run.curve and run.curve[0].round == 0:
            first.setdefault(run.cell.row.label, []).append(run.curve[0].score)
            last.setdefault(run.cell.row.label, []).append(run.figures["score"])
    if not first:
        return None
    # the best untuned score: an untuned prompt before the text makes the score worse
    untuned, best = (min(map(statistics.fmean, scores.values()), key=grid.cost) for scores in (first, last))
    return untuned + TARGET_GAIN * (best - untuned) if grid.cost(best) < grid.cost(untuned) else None


def rows_of(
    grid: Grid, runs: Sequence[RunResult], others: Iterable[tuple[Cell, RunStatus]], target: float | None
) -> list[RowResult]:
    """The rows of the table.

    Args:
        grid: resolved.
        runs: finished runs of the same task.
        others: the other cells, which the means leave out.
        target: a value of the grid's figure.
    Returns:
        The rows, the best score first.
    """
    missing: dict[str, dict[int, RunStatus]] = {}
    for cell, status in others:
        missing.setdefault(cell.row.label, {})[cell.seed] = status
    rows = []
    for row in grid.rows:
        of_row = tuple(_with_costs(run, grid, target) for run in runs if run.cell.row.label == row.label)
        figures = [{**run.figures, **run.scores} for run in of_row]
        columns = {name: [each.get(name, math.nan) for each in figures] for name in (figures[0] if of_row else {})}
        # NaN if one value is NaN: a mean over only the seeds that reached the target would be biased
        mean = {name: statistics.fmean(values) for name, values in columns.items()}
        deviation = {name: _deviation(values) for name, values in columns.items()}
        rows.append(RowResult(row, of_row, missing.get(row.label, {}), mean, deviation))
    rows = [_marked(row, rows, grid) for row in rows]
    return sorted(rows, key=lambda row: grid.cost(row.score))


def _local_only(run: Run) -> dict[str, float]:
    """The local-only baseline's figures, where the run has one."""
    baseline = run.baselines.get("local-only")
    if baseline is None:
        return {}
    return {"local-only loss": baseline.loss, **{f"local-only {name}": each for name, each in baseline.spread.items()}}


def _marked(row: RowResult, rows: Sequence[RowResult], grid: Grid) -> RowResult:
    """The row, marked if it is Pareto-optimal in bytes and score."""
    if math.isnan(row.score):
        return row
    point = (row.mean["bytes"], grid.cost(row.score))
    points = [(other.mean["bytes"], grid.cost(other.score)) for other in rows if other.runs]
    dominated = any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
    return replace(row, pareto_optimal=not dominated)


def _with_costs(run: RunResult, grid: Grid, target: float | None) -> RunResult:
    """The run with its costs to the target and its score within the budget."""
    least = math.nan if target is None else grid.cost(target)
    reached = next((point for point in run.curve if grid.cost(point.score) <= least), None)
    figures = {
        **run.figures,
        "rounds_to_target": reached.round if reached else math.nan,
        "bytes_to_target": reached.bytes if reached else math.nan,
        "seconds_to_target": reached.seconds if reached else math.nan,
    }
    budget = grid.budget_bytes
    if budget is not None:  # before round 1 nothing has been sent, so there is always such a point
        figures[f"{grid.figure}_in_budget"] = [point.score for point in run.curve if point.bytes <= budget][-1]
    return replace(run, figures=figures)


def _curve(run: Run, figure: str, own: bool) -> list[Point]:
    counts = dict(zip([0, *sorted(run.rounds)], [0.0, *_bytes_by_round(run)], strict=True))
    seconds, spent = {0: 0.0}, 0.0
    for number, entry in sorted(run.rounds.items()):
        spent += entry.seconds
        seconds[number] = spent
    hidden = own and figure not in OVER_CLIENTS

    def score(number: int) -> float:
        main = next(iter(run.evaluations[number].results.values()))
        return math.nan if hidden else main.get(figure, math.nan)

    return [
        Point(number, entry.loss, counts[number], seconds[number], score(number))
        for number, entry in sorted(run.evaluations.items())
        if number in counts
    ]


def _bytes_by_round(run: Run) -> list[float]:
    """Cumulative bytes per sampled client, up and down, after every round."""
    total, counts = 0.0, []
    for _, entry in sorted(run.rounds.items()):
        total += (sum(entry.bytes_up.values()) + sum(entry.bytes_down.values())) / max(1, len(entry.clients))
        counts.append(total)
    return counts


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan
