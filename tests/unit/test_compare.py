"""A grid is methods times settings times seeds of one task, and an invalid grid is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedferret.comparison.grid import PER_METHOD, TASK, resolve
from fedferret.core.errors import UserError
from fedferret.recipe_file import read_tables
from tiny_runs import tiny_recipe
from unit.written_grid import (
    FEDAVG,
    FERRET,
    grid_tables,
)

EXAMPLE = Path(__file__).parents[2] / "recipes" / "small" / "compare-tiny.toml"


def test_a_grid_is_methods_times_settings_times_seeds(tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": FEDAVG, "B": FERRET})
    tables["methods"][1] |= {"rounds": 5, "grid": {"algorithm.training.steps": [3, 4], "algorithm.bits": [1, 8]}}
    grid = resolve(tables)
    cells = grid.cells(tmp_path / "out")
    assert [row.label for row in grid.rows] == ["A", *(f"B, steps={s}, bits={b}" for s in (3, 4) for b in (1, 8))]
    assert [(cell.row.label[0], cell.seed) for cell in cells] == [(c, s) for s in (1, 2) for c in "ABBBB"]
    assert len({cell.folder for cell in cells}) == 10
    assert cells[-1].folder == tmp_path / "out" / "runs" / "b-steps=4-bits=8" / "seed-2"
    settings: Any = cells[-1].recipe.algorithm
    assert (cells[-1].recipe.rounds, settings.training.steps, settings.bits, settings.coordinates) == (5, 4, 8, 512)
    assert cells[0].recipe.rounds == 2 and cells[-1].recipe.data == cells[0].recipe.data
    assert cells[0].recipe.evaluation.local_only_clients == 0


def test_a_cell_is_an_ordinary_recipe(tmp_path: Path) -> None:
    first, *_ = resolve(grid_tables(tmp_path, {"A": {**FEDAVG, "training": {"steps": 3}}})).cells(tmp_path)
    plain = tiny_recipe(tmp_path, rounds=2, algorithm={**FEDAVG, "training": {"learning_rate": 0.1, "steps": 3}})
    assert first.recipe == plain


def test_a_method_inherits_only_the_training_of_another_algorithm_s_settings(tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": {}, "B": FEDAVG})
    tables["algorithm"] |= FERRET
    ferret, fedavg = (row.recipe.algorithm for row in resolve(tables).rows)
    assert (ferret.name, fedavg.name) == ("ferret", "fedavg")
    assert ferret.training == fedavg.training  # type: ignore[attr-defined]


def test_every_table_of_a_recipe_belongs_to_the_task_or_to_the_method(tmp_path: Path) -> None:
    assert {"seed", *TASK, *PER_METHOD} == set(tiny_recipe(tmp_path).tables())
    assert not set(TASK) & set(PER_METHOD)


def test_the_example_is_a_grid() -> None:
    assert [row.label for row in resolve(read_tables(EXAMPLE)).rows] == [
        "FedAvg",
        "FedAvg, 8 bits",
        "Ferret, 1 bit, coordinates=512",
        "Ferret, 1 bit, coordinates=4096",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, r"seeds=\[\]: must be a list of different whole numbers"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]: must be a list of different"),
        ({"seeds": [True]}, r"seeds=\[True\]: must be"),
        ({"target_loss": "low"}, r"target_loss='low': must be a value of loss above 0"),
        ({"budget_bytes": -1}, r"budget_bytes=-1: must be bytes above 0"),
        ({"target_los": 3.0}, r'target_los: there is no such setting in a grid; did you mean "target_loss"\?'),
        ({"methods": []}, r"\[\[methods\]\]: this list of tables is missing"),
        ({"methods": [{"algorithm": FEDAVG}]}, r"methods\[1\].label=None: must be a name"),
        ({"methods": [{"label": "A" * 400}]}, r"methods\[1\].label='A+…?': a label has at most 100 characters"),
        ({"methods": [{"label": "A\x1b[31m"}]}, r"a label has at most 100 characters and no control"),
        ({"methods": [{"label": "…", "algorithm": FEDAVG}]}, r'"…": a label needs one of a-z or 0-9'),
        ({"methods": [{"label": "A b"}, {"label": "a B"}]}, r'"a B" and "A b" share a folder'),
        ({"methods": [{"label": "A", "clients": {}}]}, r"methods\[1\].clients: all methods of a grid have the same"),
        ({"methods": [{"label": "A", "seed": 3}]}, r"methods\[1\].seed: all methods of a grid have the same task"),
        ({"methods": [{"label": "A", "round": 3}]}, r'methods\[1\].round: there .* did you mean "rounds"\?'),
        ({"methods": [{"label": "A", "grid": {"rounds": 3}}]}, r'grid."rounds"=3: must be a list of values'),
        ({"methods": [{"label": "A", "grid": {"text.packed": [True]}}]}, r'grid."text.packed": all methods of a grid'),
        ({"methods": [{"label": "A", "grid": {"algorithm.x": [1]}}]}, r"A, x=1: algorithm.x: there is no such setting"),
        ({"methods": [{"label": "A", "algorithm": {"name": "fedavgg"}}]}, r'A: no method is called "fedavgg"'),
        ({"methods": [{"label": "A", "algorithm": 3}]}, r"methods.algorithm=3: must be a table"),
    ],
)
def test_an_invalid_grid_is_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": FEDAVG})
    tables["algorithm"] |= FEDAVG
    with pytest.raises(UserError, match=message) as refused:
        resolve({**tables, **change})
    assert "\n" not in str(refused.value)


def test_only_selects_rows_and_whole_entries(tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": FEDAVG, "B": FERRET})
    tables["methods"][1]["grid"] = {"algorithm.bits": [1, 8]}
    grid = resolve(tables)
    assert [row.label for row in grid.chosen([])] == ["A", "B, bits=1", "B, bits=8"]
    assert [row.label for row in grid.chosen(["B"])] == ["B, bits=1", "B, bits=8"]
    assert [row.label for row in grid.chosen(["B, bits=8", "A"])] == ["A", "B, bits=8"]
    with pytest.raises(UserError, match='no method of this grid has the label "C": allowed: A, B'):
        grid.chosen(["C"])
