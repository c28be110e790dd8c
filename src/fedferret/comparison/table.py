"""The table of a comparison: on the terminal, as comparison.md for pages, comparison.csv and comparison.json for tools.

A cell is mean ± sample standard deviation over the seeds; CSV and JSON have the plain numbers: losses in nats a token,
bytes, seconds, rounds.
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

from fedferret.comparison.results import SHARE_OF_GAIN, Comparison, RowResult
from fedferret.core.files import write_atomically
from fedferret.tracking.units import as_bytes, as_duration, as_loss

FRONT = "◆"


@dataclass(frozen=True)
class Column:
    """One of the table's figures, and how people read it."""

    name: str
    heading: str
    written: Callable[[float], str]


COLUMNS = (
    Column("loss", "loss", as_loss),
    Column("bytes_up", "up", as_bytes),
    Column("bytes_down", "down", as_bytes),
    Column("bytes", "up and down in all", as_bytes),
    Column("seconds_local", "local time", as_duration),
    Column("seconds_overhead", "overhead", as_duration),
    Column("peak_memory_bytes", "peak memory", as_bytes),
    Column("rounds_to_target", "rounds to target", lambda rounds: f"{rounds:.3g}"),
    Column("bytes_to_target", "bytes to target", as_bytes),
)


def write_tables(comparison: Comparison) -> None:
    """Write comparison.md, comparison.csv and comparison.json into the grid's folder."""
    for name, text in (("md", as_markdown), ("csv", as_csv), ("json", as_json)):
        write_atomically(comparison.out / f"comparison.{name}", text(comparison))


def columns(comparison: Comparison) -> list[Column]:
    """Those of every comparison, and after the loss what else its runs measured of the main held-out set."""
    scores = dict.fromkeys(name for row in comparison.rows for run in row.runs for name in run.scores)
    loss, *others = COLUMNS
    budget = comparison.grid.budget_bytes
    within = [] if budget is None else [Column("loss_in_budget", f"loss within {as_bytes(budget)}", as_loss)]
    return [loss, *within, *(Column(name, name, lambda score: f"{score:.3f}") for name in scores), *others]


def headings(comparison: Comparison) -> list[str]:
    """Of the columns, in order."""
    return ["method", "seeds", *(column.heading for column in columns(comparison))]


def cells(comparison: Comparison, row: RowResult, beside: str = " ") -> list[str]:
    """A row as text; ``beside`` stands between a mean and its deviation."""
    planned = len(comparison.grid.seeds)
    label = f"{row.row.label} {FRONT}" if row.pareto_optimal else row.row.label
    if not row.runs:
        states = sorted({now.state for now in row.missing.values()})
        return [label, f"0 of {planned}", ", ".join(states), *[""] * (len(columns(comparison)) - 1)]
    seeds = f"{len(row.runs)} of {planned}" if len(row.runs) < planned else str(planned)
    return [label, seeds, *(_cell(row, column, beside) for column in columns(comparison))]


def _cell(row: RowResult, column: Column, beside: str) -> str:
    mean, deviation = row.mean.get(column.name, math.nan), row.deviation.get(column.name, math.nan)
    if math.isnan(mean):
        reached = sum(not math.isnan(run.figures.get(column.name, math.nan)) for run in row.runs)
        return f"reached by {reached} of {len(row.runs)}" if reached else "-"
    if math.isnan(deviation):
        return f"{column.written(mean)}{beside}± -" if column.name == "loss" else column.written(mean)
    return f"{column.written(mean)}{beside}± {column.written(deviation)}"


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know, a sentence or two each."""
    grid, target = comparison.grid, comparison.target
    lines = [
        "Mean ± sample standard deviation over the seeds. Loss: held-out, nats a token, after the last round; the "
        "table is sorted by it.",
        "Up and down: a client's encoded messages in a round, catching up included, the base model not. Up and down "
        "in all, and bytes to target: those of one place in the cohort, both ways, since the first round.",
        "Local time: the clients' training, all rounds. Overhead: the rest of the rounds, evaluation left out. Peak "
        "memory: of the run's process.",
    ]
    if target is None:
        lines.append("Target: none; no row lowered the loss.")
    elif grid.target_loss is not None:
        lines.append(f"Target: loss {as_loss(target)}, as the grid says, at the first evaluated round that reached it.")
    else:
        lines.append(
            f"Target: loss {as_loss(target)}, the untuned loss less {SHARE_OF_GAIN:.0%} of what the best row gained, "
            "at the first evaluated round that reached it."
        )
    if grid.budget_bytes is not None:
        lines.append(
            f"Loss within {as_bytes(grid.budget_bytes)}: after the last evaluated round by which one place in the "
            "cohort had sent and received no more; where one round is dearer, that is the untuned model's."
        )
    lines.append(f"{FRONT}: no other row has both fewer bytes in all and a lower loss.")
    return lines


def absences(comparison: Comparison) -> list[str]:
    """The runs that have no part in the means, a line each."""
    return [f"{row.row.label}, seed {seed}: {now}" for row in comparison.rows for seed, now in row.missing.items()]


def as_rich(comparison: Comparison) -> Table:
    """For the terminal."""
    table = Table(title=f"{comparison.out}", title_justify="left")
    for number, heading in enumerate(headings(comparison)):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in comparison.rows:
        table.add_row(*cells(comparison, row, "\n"))
    return table


def as_markdown(comparison: Comparison) -> str:
    """A table that a page can take in, with its notes."""
    lines = [_markdown_row(headings(comparison)), "|---|" + "---:|" * (len(columns(comparison)) + 1)]
    lines += [_markdown_row(cells(comparison, row)) for row in comparison.rows]
    for title, texts in (("", notes(comparison) + list(comparison.remarks)), ("Left out:", absences(comparison))):
        if texts:
            lines += ["", *([title, ""] if title else []), *(f"* {text}" for text in texts)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(comparison: Comparison) -> str:
    """A line for each row: plain numbers, empty where there is none."""
    names = list(dict.fromkeys(name for row in comparison.rows for name in row.mean))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "seeds", "seeds_planned", "pareto_optimal", *(n for name in names for n in (name, f"{name}_std"))]
    )
    for row in comparison.rows:
        numbers = [values.get(name, math.nan) for name in names for values in (row.mean, row.deviation)]
        start = [row.row.label, len(row.runs), len(comparison.grid.seeds), int(row.pareto_optimal)]
        writer.writerow([*start, *("" if math.isnan(number) else repr(number) for number in numbers)])
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """Everything: rows, runs, curves, checks."""
    plain = {
        "seeds": list(comparison.grid.seeds),
        "target_loss": comparison.target,
        "target_given": comparison.grid.target_loss is not None,
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
        "missing": {str(seed): str(now) for seed, now in row.missing.items()},
        "runs": [
            {
                "seed": run.cell.seed,
                "folder": None if run.imported_runs else run.cell.folder.relative_to(comparison.out).as_posix(),
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
