"""The grid of a comparison: one task, several methods, several seeds.

    grid file = the tables of a recipe (the base)  +  seeds, target, budget_bytes, [[methods]]
    a row     = the base, overridden by a [[methods]] entry and one combination of the values in its [methods.grid]
    a cell    = a row with one seed: an ordinary recipe, run in OUT/runs/<row>/seed-<seed>

The base alone sets the task (model, data, text, clients). A method cannot override the task.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedferret.config import Recipe, from_tables, merged
from fedferret.core.errors import UserError, nearest
from fedferret.core.text import printable

TASK = ("model", "data", "objective", "text", "clients")
PER_METHOD = ("rounds", "algorithm", "pool", "evaluation", "execution")  # what a method may override
CLIENT_MEAN = "client-mean"  # of ``evaluation/per_client.py``
_LONGEST = 100  # characters of a label
_GRID = ("seeds", "target", "target_loss", "budget_bytes", "methods")


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table: a method with its settings. ``entry`` is the label of its [[methods]] entry."""

    label: str
    entry: str
    recipe: Recipe  # with the grid's first seed

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^a-z0-9._=+]+", "-", self.label.lower()).strip("-.")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the grid. ``folder`` is the run folder. The run's other files are next to it, under the same name."""

    row: Row
    recipe: Recipe
    folder: Path

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.recipe.seed

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"{self.row.label}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """A resolved grid file."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    target: float | None  # of the figure that rows are judged by
    budget_bytes: float | None  # up and down, per sampled client, summed over the rounds
    tables: Mapping[str, Any]  # the file's TOML tables

    @property
    def mixed(self) -> bool:
        """Whether some rows have a global model, and others one model per client and no other."""
        return len({row.recipe.algorithm.has_global_model for row in self.rows}) > 1

    @property
    def figure(self) -> str:
        """What rows are ranked by: the objective's primary figure, "loss" or "accuracy" for example.

        Rows with and without a global model have its mean over clients in common, where all rows score clients.
        """
        if self.mixed and all(row.recipe.scores_clients for row in self.rows):
            return CLIENT_MEAN
        return self.rows[0].recipe.objective.primary

    @property
    def higher_is_better(self) -> bool:
        """Of that figure."""
        return self.rows[0].recipe.objective.higher_is_better

    def cost(self, score: float) -> float:
        """The figure as something to minimise.

        Args:
            score: a value of the figure.

        Returns:
            The value, with its sign changed where higher is better; infinite for NaN, so that such rows sort last.
        """
        return math.inf if math.isnan(score) else -score if self.higher_is_better else score

    def to_toml(self) -> str:
        """The grid as TOML.

        Returns:
            TOML of the tables that ``resolve`` took.
        """
        import tomli_w

        return tomli_w.dumps(self.tables)

    def cells(self, out: Path) -> list[Cell]:
        """Every run, in the order of execution: all rows with the first seed, then with the next.

        Args:
            out: the folder of the runs.

        Returns:
            One cell per row and seed.
        """
        return [
            Cell(row, replace(row.recipe, seed=seed), out / "runs" / row.slug / f"seed-{seed}")
            for seed in self.seeds
            for row in self.rows
        ]

    def chosen(self, labels: Sequence[str]) -> list[Row]:
        """The rows with these labels, or from the entries with these labels; all rows if ``labels`` is empty.

        Args:
            labels: of rows or entries.

        Returns:
            Rows in the grid's order.

        Raises:
            UserError: for an unknown label.
        """
        known = {label for row in self.rows for label in (row.label, row.entry)}
        for label in labels:
            if label not in known:
                raise UserError(f'no method of this grid has the label "{label}": {nearest(label, known)}')
        return [row for row in self.rows if not labels or row.label in labels or row.entry in labels]


def resolve(tables: Mapping[str, Any]) -> Grid:
    """The grid in these TOML tables.

    Args:
        tables: of a grid file, with the overrides applied.

    Returns:
        The grid, with a recipe for every row.

    Raises:
        UserError: for an invalid setting.
    """
    allowed = ("seed", *_GRID, *TASK, *PER_METHOD)
    for name in tables:
        if name not in allowed:
            raise UserError(f"{name}: there is no such setting in a grid; {nearest(name, allowed)}")
    base = {name: value for name, value in tables.items() if name not in _GRID}
    # the table does not show the local-only baseline, which takes as long as another method
    base["evaluation"] = {"local_only_clients": 0, **_table(base.get("evaluation", {}), "evaluation")}
    seeds = _seeds(tables)
    rows: list[Row] = []
    for number, entry in enumerate(_entries(tables), start=1):
        rows += _rows({**base, "seed": seeds[0]}, entry, f"methods[{number}]")
    _refuse_same_folder(rows)
    target = _target(tables, rows[0].recipe.objective.primary)
    budget = _above_zero(tables, "budget_bytes", "bytes above 0, such as 500_000")
    return Grid(tuple(rows), seeds, target, budget, tables)


def _target(tables: Mapping[str, Any], figure: str) -> float | None:
    """The value of the figure that a row's cost is counted to, if the grid has one."""
    if "target_loss" in tables and (figure != "loss" or "target" in tables):
        other = "target says the same" if figure == "loss" else f"these runs are judged by {figure}"
        raise UserError(f"target_loss={tables['target_loss']}: {other}; give target alone")
    name = "target_loss" if "target_loss" in tables else "target"
    return _above_zero(tables, name, f"a value of {figure} above 0")


def _rows(base: dict[str, Any], entry: Mapping[str, Any], where: str) -> Iterator[Row]:
    label = entry.get("label")
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"{where}.label={label!r}: must be a name for the table")
    if printable(label, _LONGEST) != label:
        raise UserError(
            f"{where}.label={printable(label, 40)!r}: a label has at most {_LONGEST} characters and no control "
            f"characters"
        )
    overrides = {name: value for name, value in entry.items() if name not in ("label", "grid")}
    for name in overrides:
        _refuse_shared(name, f"{where}.{name}", ("label", "grid", *PER_METHOD))
    for settings in _combinations(entry.get("grid", {}), f"{where}.grid"):
        tables = _overridden(base, overrides)
        for name, value in settings.items():
            tables = merged(tables, _nested(name, value))
        full = ", ".join([label, *(f"{short}={_shown(value)}" for short, value in _shortened(settings))])
        if len(full) > 2 * _LONGEST:  # a folder has this name
            raise UserError(
                f"{where}.grid: {printable(full, 40)!r} and so on has {len(full)} characters; shorten the values"
            )
        try:
            recipe = from_tables(tables)
        except UserError as error:
            raise UserError(f"{full}: {error}") from None
        yield Row(full, label, recipe)


def _overridden(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The base overridden by a method's tables. Of another algorithm's settings a method inherits only the training."""
    algorithm = _table(overrides.get("algorithm", {}), "methods.algorithm")
    shared = _table(base.get("algorithm", {}), "algorithm")
    if algorithm.get("name", shared.get("name")) != shared.get("name"):
        base = {**base, "algorithm": {name: value for name, value in shared.items() if name == "training"}}
    return merged(base, overrides)


def _combinations(grid: Any, where: str) -> Iterator[dict[str, Any]]:
    for name, values in _table(grid, where).items():
        _refuse_shared(name.partition(".")[0], f'{where}."{name}"', PER_METHOD)
        if not isinstance(values, list) or not values:
            raise UserError(f'{where}."{name}"={values!r}: must be a list of values, one per row')
    yield from (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def _nested(name: str, value: Any) -> dict[str, Any]:
    first, dot, rest = name.partition(".")
    return {first: _nested(rest, value) if dot else value}


def _shortened(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each setting by its key alone, or by its dotted name if two keys are equal."""
    keys = [name.rpartition(".")[2] for name in settings]
    return [
        (key if keys.count(key) == 1 else name, value)
        for key, (name, value) in zip(keys, settings.items(), strict=True)
    ]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse_shared(name: str, where: str, allowed: Iterable[str]) -> None:
    if name in TASK or name in ("seed", "seeds"):
        raise UserError(f"{where}: all methods of a grid have the same task; set {name} once, for the whole grid")
    if name not in allowed:
        raise UserError(f"{where}: there is no such setting; {nearest(name, allowed)}")


def _refuse_same_folder(rows: Sequence[Row]) -> None:
    known: dict[str, Row] = {}
    for row in rows:
        if not row.slug:
            raise UserError(f'"{row.label}": a label needs one of a-z or 0-9, because the run folder is named after it')
        if row.slug in known:
            raise UserError(f'"{row.label}" and "{known[row.slug].label}" share a folder: make the labels differ more')
        known[row.slug] = row


def _entries(tables: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = tables.get("methods")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise UserError("[[methods]]: this list of tables is missing; a grid has one table per method")
    return entries


def _seeds(tables: Mapping[str, Any]) -> tuple[int, ...]:
    seeds = tables.get("seeds", [tables.get("seed", 1)])
    whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={seeds!r}: must be a list of different whole numbers, such as [1, 2, 3]")
    return tuple(seeds)


def _above_zero(tables: Mapping[str, Any], name: str, what: str) -> float | None:
    value = tables.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{name}={value!r}: must be {what}, or be left out")
    return float(value)


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}={value!r}: must be a table, [{where}]")
    return value
