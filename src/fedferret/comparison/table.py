"""The table of a comparison: on the terminal, as comparison.md for pages, comparison.csv and comparison.json for tools.

A cell is mean ± sample standard deviation over the seeds. CSV and JSON have unformatted values: losses in nats, bytes,
seconds, rounds.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from fedferret.comparison.grid import Grid
from fedferret.comparison.results import OVER_CLIENTS, TARGET_GAIN, Comparison, RowResult
from fedferret.core.files import write_atomically
from fedferret.tracking.units import as_bytes, as_duration, as_loss

PARETO_MARK = "◆"
NO_GLOBAL_MODEL = "no global model"


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str  # in comparison.csv
    heading: str
    formatted: Callable[[float], str]


COLUMNS = (
    Column("loss", "loss", as_loss),
    Column("bytes_up", "up", as_bytes),
    Column("bytes_down", "down", as_bytes),
    Column("bytes", "total up and down", as_bytes),
    Column("seconds_local", "local time", as_duration),
    Column("seconds_overhead", "overhead", as_duration),
    Column("peak_memory_bytes", "peak memory", as_bytes),
    Column("rounds_to_target", "rounds to target", lambda rounds: f"{rounds:.3g}"),
    Column("bytes_to_target", "bytes to target", as_bytes),
)


def write_tables(comparison: Comparison) -> None:
    """Write comparison.md, comparison.csv and comparison.json into the grid's folder.

    Args:
        comparison: of a grid.
    """
    for name, text in (("md", as_markdown), ("csv", as_csv), ("json", as_json)):
        write_atomically(comparison.out / f"comparison.{name}", text(comparison))


def columns(comparison: Comparison) -> list[Column]:
    """The columns of every comparison. After the loss come the other figures of the main held-out set.

    Args:
        comparison: of a grid.

    Returns:
        The columns, in order.
    """
    scores = dict.fromkeys(name for row in comparison.rows for run in row.runs for name in run.scores)
    loss, *others = COLUMNS
    budget = comparison.grid.budget_bytes
    heading = f"{comparison.grid.figure} within {as_bytes(budget or 0)}"
    within = [] if budget is None else [Column(f"{comparison.grid.figure}_in_budget", heading, as_loss)]
    return [loss, *within, *(Column(name, name, lambda score: f"{score:.3f}") for name in scores), *others]


def headings(comparison: Comparison) -> list[str]:
    """The headings of the columns, in order.

    Args:
        comparison: of a grid.

    Returns:
        Text, with the two columns before the figures.
    """
    return ["method", "seeds", *(column.heading for column in columns(comparison))]


def cells(comparison: Comparison, row: RowResult, separator: str = " ") -> list[str]:
    """A row as text.

    Args:
        comparison: of the row.
        row: to format.
        separator: between a mean and its deviation.

    Returns:
        Text, one per heading.
    """
    planned = len(comparison.grid.seeds)
    label = f"{row.row.label} {PARETO_MARK}" if row.pareto_optimal else row.row.label
    if not row.runs:
        states = sorted({status.state for status in row.missing.values()})
        return [label, f"0 of {planned}", ", ".join(states), *[""] * (len(columns(comparison)) - 1)]
    seeds = f"{len(row.runs)} of {planned}" if len(row.runs) < planned else str(planned)
    return [label, seeds, *(_cell(row, column, separator) for column in columns(comparison))]


def _cell(row: RowResult, column: Column, separator: str) -> str:
    mean, deviation = row.mean.get(column.name, math.nan), row.deviation.get(column.name, math.nan)
    if math.isnan(mean):
        of_model = column not in COLUMNS[1:] and not column.name.startswith("local-only")
        if of_model and not row.row.recipe.algorithm.has_global_model:
            return NO_GLOBAL_MODEL
        reached = sum(not math.isnan(run.figures.get(column.name, math.nan)) for run in row.runs)
        return f"reached by {reached} of {len(row.runs)}" if reached else "-"
    if math.isnan(deviation):
        return f"{column.formatted(mean)}{separator}± -" if column.name == "loss" else column.formatted(mean)
    return f"{column.formatted(mean)}{separator}± {column.formatted(deviation)}"


def notes(comparison: Comparison) -> list[str]:
    """The notes below the table.

    Args:
        comparison: of a grid.

    Returns:
        Sentences, each a note.
    """
    grid, target = comparison.grid, comparison.target
    lines = [
        f"Mean ± sample standard deviation over the seeds. Loss: held-out{_unit(grid)}, after the last round. Rows "
        f"are sorted by {grid.figure}.",
        "Up, down: encoded messages per client and round, catching up included, the base model excluded. Total up and "
        "down, bytes to target: per sampled client, summed over the rounds.",
        "Local time: the clients' training, all rounds. Overhead: the rest of the rounds, without evaluation. Peak "
        "memory: of the run's process.",
    ]
    if target is None:
        moved = "raised" if grid.higher_is_better else "lowered"
        lines.append(f"Target: none; no row {moved} the {grid.figure}.")
    elif grid.target is not None:
        lines.append(
            f"Target: {grid.figure} {as_loss(target)}, from the grid, at the first evaluated round that reached it."
        )
    else:
        lines.append(
            f"Target: {grid.figure} {as_loss(target)}, the untuned {grid.figure} and {TARGET_GAIN:.0%} of the best "
            "row's gain, at the first evaluated round that reached it."
        )
    if grid.budget_bytes is not None:
        lines.append(
            f"{grid.figure.capitalize()} within {as_bytes(grid.budget_bytes)}: after the last evaluated round with at "
            "most that total up and down per sampled client; the untuned model's if one round takes more."
        )
    lines.append(f"{PARETO_MARK}: Pareto-optimal, no other row has both fewer total bytes and a better {grid.figure}.")
    if grid.mixed:
        lines.append(
            f"{NO_GLOBAL_MODEL.capitalize()}: every client has its own. Client-mean, worst-tenth and deviation are "
            "over clients, each scored on what it holds out with the model that it would use, global or its own."
        )
        if grid.figure not in OVER_CLIENTS:
            lines.append(f"Rows with no {grid.figure} come last: set evaluation.per_client = true to rank all rows.")
    if any(name.startswith("local-only") for row in comparison.rows for name in row.mean):
        lines.append("Local-only: clients that train alone as long as the federation, with the row's local steps.")
    return lines


def _unit(grid: Grid) -> str:
    objective = grid.rows[0].recipe.objective
    targets = "token" if objective.generates else "example" if objective.primary == "accuracy" else None
    return f", nats per {targets}" if targets else ""


def missing_runs(comparison: Comparison) -> list[str]:
    """The runs that the means leave out, one line each.

    Args:
        comparison: of a grid.

    Returns:
        Row, seed and status of each.
    """
    return [
        f"{row.row.label}, seed {seed}: {status}" for row in comparison.rows for seed, status in row.missing.items()
    ]


def as_rich(comparison: Comparison) -> Table:
    """The table for the terminal.

    Args:
        comparison: of a grid.

    Returns:
        A table that the terminal folds.
    """
    table = Table(title=f"{comparison.out}", title_justify="left")
    for number, heading in enumerate(headings(comparison)):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in comparison.rows:
        table.add_row(*cells(comparison, row, "\n"))
    return table


def as_markdown(comparison: Comparison) -> str:
    """The table and its notes as Markdown.

    Args:
        comparison: of a grid.

    Returns:
        Text that ends with a line break.
    """
    lines = [_markdown_row(headings(comparison)), "|---|" + "---:|" * (len(columns(comparison)) + 1)]
    lines += [_markdown_row(cells(comparison, row)) for row in comparison.rows]
    for title, texts in (("", notes(comparison) + list(comparison.remarks)), ("Left out:", missing_runs(comparison))):
        if texts:
            lines += ["", *([title, ""] if title else []), *(f"* {text}" for text in texts)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(comparison: Comparison) -> str:
    """The table as CSV: a line per row, unformatted values, an empty field for NaN.

    Args:
        comparison: of a grid.

    Returns:
        Text with a head.
    """
    names = list(dict.fromkeys(name for row in comparison.rows for name in row.mean))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "seeds", "seeds_planned", "pareto_optimal", *(n for name in names for n in (name, f"{name}_std"))]
    )
    for row in comparison.rows:
        figures = [values.get(name, math.nan) for name in names for values in (row.mean, row.deviation)]
        start = [row.row.label, len(row.runs), len(comparison.grid.seeds), int(row.pareto_optimal)]
        writer.writerow([*start, *("" if math.isnan(figure) else repr(figure) for figure in figures)])
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """The comparison as JSON: rows, runs, curves, checks.

    Args:
        comparison: of a grid.

    Returns:
        Text without NaN, which JSON has not.
    """
    plain = {
        "seeds": list(comparison.grid.seeds),
        "figure": comparison.grid.figure,
        "higher_is_better": comparison.grid.higher_is_better,
        "target": comparison.target,
        "target_given": comparison.grid.target is not None,
        "same_in_all_runs": list(comparison.remarks),
        "left_out": list(comparison.left_out),
        "rows": [_plain_row(comparison, row) for row in comparison.rows],
    }
    return json.dumps(_finite(plain), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain_row(comparison: Comparison, row: RowResult) -> dict[str, Any]:
    return {
        "method": row.row.label,
        "algorithm": row.row.recipe.algorithm.name,
        "pareto_optimal": row.pareto_optimal,
        "mean": row.mean,
        "std": row.deviation,
        "missing": {str(seed): str(status) for seed, status in row.missing.items()},
        "runs": [
            {
                "seed": run.cell.seed,
                "folder": None if run.imported_from else run.cell.folder.relative_to(comparison.out).as_posix(),
                "task": asdict(run.task),
                "figures": {**run.figures, **run.scores},
                "scores": list(run.scores),
                "curve": [point._asdict() for point in run.curve],
            }
            for run in row.runs
        ],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
