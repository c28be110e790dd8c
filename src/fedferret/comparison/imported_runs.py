"""Runs of a grid that were measured in another folder, perhaps on another machine: read from what compare wrote there.

    taken      a run of a row and seed that this folder has not finished, whose recipe is this grid's, by that
               folder's grid.toml; how it was carried out (engine, device, memory) may differ
    not taken  one with other settings; one of a row that this grid has not
    checked    like any run: same weights, data and clients as the others of its seed (``sameness``)

So a grid can be played in parts, and its table holds all of them. Seconds are those of the machine that played.
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
from fedferret.core.errors import UserError
from fedferret.recipe_file import read_tables


def measured(grid: Grid, out: Path, folders: Sequence[Path]) -> dict[str, RunResult]:
    """The runs of this grid's cells, by the cells' names, that those folders hold; of several the first folder's.

    Raises UserError for a folder that holds no comparison.
    """
    found: dict[str, RunResult] = {}
    for folder in folders:
        theirs, comparison = _read(folder)
        recipes = {(cell.row.label, cell.seed): cell.recipe.identity() for cell in theirs.cells(folder)}
        held = {(row["method"], run["seed"]): run for row in comparison["rows"] for run in row["runs"]}
        for cell in grid.cells(out):
            place = (cell.row.label, cell.seed)
            if place in held and cell.name not in found and recipes.get(place) == cell.recipe.identity():
                found[cell.name] = _result(cell, folder, held[place])
    return found


def _read(folder: Path) -> tuple[Grid, dict[str, Any]]:
    try:
        comparison: dict[str, Any] = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        return resolve_grid(read_tables(folder / "grid.toml", ())), comparison
    except FileNotFoundError as error:
        raise UserError(
            f"--also {folder}: {error.filename} is missing; a folder of `fedferret compare` has it"
        ) from None
    except ValueError as error:
        raise UserError(f"--also {folder}: comparison.json cannot be read ({error})") from None


def _result(cell: Cell, folder: Path, run: dict[str, Any]) -> RunResult:
    try:
        numbers = {name: math.nan if value is None else float(value) for name, value in run["figures"].items()}
        scores = set(run.get("scores", ()))
        return RunResult(
            cell,
            tuple(Point(*(float(point[name]) for name in Point._fields)) for point in run["curve"]),
            {name: value for name, value in numbers.items() if name not in scores},
            {name: value for name, value in numbers.items() if name in scores},
            Task(**run["task"]),
            folder,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"--also {folder}: {cell.name} has no {error}; an older fedferret wrote it") from None
