"""Runs of a grid that are imported from another comparison folder, perhaps of another machine.

    imported      a run of a row and seed that this folder has not finished, if the other folder's grid.toml gives it
                  the same recipe; [execution] (engine, device, memory) may differ
    not imported  a run with other settings, or of a row that this grid does not have
    checked       like any run: same weights, data and clients as the other runs of its seed (``comparability``)

So a grid can run in parts, and its table holds all of them. Seconds are those of the machine that ran the run.
Only grid.toml and comparison.json of the other folder are read. A comparison.json of fedferret 0.1 is read too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedferret.comparison.comparability import Task
from fedferret.comparison.grid import Cell, Grid
from fedferret.comparison.grid import resolve as resolve_grid
from fedferret.comparison.results import Point, RunResult
from fedferret.core.errors import RunError, UserError
from fedferret.core.files import inside, read_intact
from fedferret.recipe_file import read_tables

_REMEDY = "give a folder that `fedferret compare` wrote"


def import_runs(grid: Grid, out: Path, folders: Sequence[Path]) -> dict[str, RunResult]:
    """The results of this grid's cells in other comparison folders.

    Args:
        grid: resolved.
        out: the folder of this grid's runs.
        folders: to import from; where several have a run, the first one counts.
    Returns:
        Results by the cells' names.
    Raises:
        UserError: for a folder without a comparison, or with one that is ranked by another figure.
    """
    found: dict[str, RunResult] = {}
    for folder in folders:
        other, comparison = _read(folder)
        if other.figure != grid.figure:
            raise UserError(
                f"--also {folder}: its rows are ranked by {other.figure}, and those of this grid by {grid.figure}; "
                f"give a grid of methods with and without a global model, as here"
            )
        recipes = {(cell.row.label, cell.seed): cell.recipe.identity() for cell in other.cells(folder)}
        try:
            runs = {(row["method"], run["seed"]): run for row in comparison["rows"] for run in row["runs"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"--also {folder}: comparison.json is damaged ({error}): {_REMEDY}") from None
        for cell in grid.cells(out):
            key = (cell.row.label, cell.seed)
            if key in runs and cell.name not in found and recipes.get(key) == cell.recipe.identity():
                found[cell.name] = _result(cell, folder, runs[key])
    return found


def _read(folder: Path) -> tuple[Grid, dict[str, Any]]:
    path, grid = (inside(folder, folder / name) for name in ("comparison.json", "grid.toml"))
    try:
        content = read_intact(path, _REMEDY)
        read_intact(grid, _REMEDY)
        comparison = dict(json.loads(content))
    except RunError as error:
        raise UserError(f"--also {folder}: {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"--also {folder}: comparison.json cannot be read ({error}): {_REMEDY}") from None
    return resolve_grid(read_tables(grid, ())), comparison


def _result(cell: Cell, folder: Path, run: dict[str, Any]) -> RunResult:
    try:
        figures = {name: math.nan if value is None else float(value) for name, value in run["figures"].items()}
        if cell.recipe.objective.primary == "loss":
            figures.setdefault("score", figures["loss"])
        scores = set(run.get("scores", ()))
        return RunResult(
            cell,
            tuple(Point(*(float(point[name]) for name in Point._fields)) for point in map(_with_score, run["curve"])),
            {name: value for name, value in figures.items() if name not in scores},
            {name: value for name, value in figures.items() if name in scores},
            Task(**run["task"]),
            folder,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--also {folder}: {cell.name} has no {error}; an older fedferret wrote it") from None


def _with_score(point: dict[str, float]) -> dict[str, float]:
    """The point; comparisons from before there were other scores have the loss alone."""
    return {"score": point["loss"], **point}
