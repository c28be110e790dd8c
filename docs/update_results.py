"""Write the results of comparisons into docs/results.md: a table per comparison between its markers, and the plots.

python -m docs.update_results [GRID_FOLDER...]    copies comparison.json, grid.toml and two plots of each folder to
                                                  docs/results, then rewrites all tables from docs/results
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from docs.update_readme import on_paper, replace_between

from fedferret.core.files import write_atomically
from fedferret.tracking.units import as_bytes

PLOTS = ("loss-by-bytes", "loss-by-round")


def take(grid: Path, results: Path) -> None:
    """Copy the results of a comparison's folder: comparison.json, grid.toml and the plots on white.

    Args:
        grid: the comparison's folder.
        results: docs/results.
    """
    target = results / grid.name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(grid / "comparison.json", target / "comparison.json")
    shutil.copyfile(grid / "grid.toml", target / "grid.toml")
    for name in PLOTS:
        write_atomically(target / f"{name}.svg", on_paper((grid / "plots" / f"{name}.svg").read_text()))


def table(comparison: dict[str, Any]) -> str:
    """The Markdown of a comparison.json: rows with a finished run, the lowest loss first."""
    finished = [row for row in comparison["rows"] if row["runs"]]
    budget = any("loss_in_budget" in row["mean"] for row in finished)
    within = ["within the budget"] if budget else []
    headings = ["method", "seeds", "loss", *within, "up", "down", "both ways, the run", "memory"]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for row in finished:
        mean = row["mean"]
        name = f"**{row['method']}**" if row["pareto_optimal"] else row["method"]
        cells = [name, str(len(row["runs"])), _loss(row, "loss"), *([_loss(row, "loss_in_budget")] if budget else [])]
        cells += [as_bytes(mean[column]) for column in ("bytes_up", "bytes_down", "bytes", "peak_memory_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    lost = [
        f"{row['method']}, seed {seed}: {': '.join(state.split(': ')[:2])}"  # not every client's own words
        for row in comparison["rows"]
        for seed, state in row["missing"].items()
        if state.startswith(("diverged", "failed"))
    ]
    return "\n".join([*lines, *(["", "Left out: " + "; ".join(lost) + "."] if lost else [])])


def _loss(row: dict[str, Any], column: str) -> str:
    mean, deviation = row["mean"][column], row["std"][column]
    return f"{mean:,.3f}" if deviation is None else f"{mean:,.3f} ± {deviation:.3f}"


def update(page: Path) -> None:
    """Rewrite every table of ``page`` from the folder ``results`` next to it."""
    for path in sorted((page.parent / "results").glob("*/comparison.json")):
        replace_between(page, path.parent.name, table(json.loads(path.read_text())))


if __name__ == "__main__":
    docs = Path(__file__).resolve().parent
    for folder in sys.argv[1:]:
        take(Path(folder), docs / "results")
    update(docs / "results.md")
