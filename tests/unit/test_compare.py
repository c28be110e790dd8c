"""A comparison compares like with like, counts right, and stops and goes on as its runs do."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from filelock import FileLock
from typer.testing import CliRunner

from contract.methods import METHODS
from fedferret.algorithms.registry import catalogue
from fedferret.cli import app
from fedferret.comparison import compare
from fedferret.comparison.commands import gather
from fedferret.comparison.grid import OWN, TASK, Cell, Grid, resolve
from fedferret.comparison.results import Comparison, RowResult
from fedferret.comparison.sameness import Task, differing, task_of
from fedferret.comparison.standing import note, output_of, record_of, standing
from fedferret.comparison.table import as_csv, as_json, as_markdown
from fedferret.comparison.worker import Outcome, Worker
from fedferret.config import Recipe
from fedferret.core.errors import RunError, UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import endless
from fedferret.recipe_file import read_tables
from fedferret.runner import run
from fedferret.tracking.events import read
from fedferret.tracking.summary import read_summary
from tiny_runs import tiny_recipe, write_rows
from toys import Rows, ToyData, simulate, toy_clients
from unit.written_grid import cell_of, grid_tables, write_cell, written_grid

FEDAVG, FERRET = {"name": "fedavg"}, {"name": "ferret", "coordinates": 512}
PATIENCE = 900.0  # seconds for anything: a machine may have far more to do than this
EXAMPLE = Path(__file__).parents[2] / "recipes" / "small" / "compare-tiny.toml"


def silent(line: str) -> None:
    """Say nothing."""


# --- the grid


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


def test_of_another_algorithm_s_settings_a_method_takes_over_the_training_alone(tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": {}, "B": FEDAVG})
    tables["algorithm"] |= FERRET
    ferret, fedavg = (row.recipe.algorithm for row in resolve(tables).rows)
    assert (ferret.name, fedavg.name) == ("ferret", "fedavg")
    assert ferret.training == fedavg.training  # type: ignore[attr-defined]


def test_every_table_of_a_recipe_is_the_task_s_or_the_method_s_own(tmp_path: Path) -> None:
    assert {"seed", *TASK, *OWN} == set(tiny_recipe(tmp_path).tables())
    assert not set(TASK) & set(OWN)


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
        ({"target_loss": "low"}, r"target_loss='low': must be a loss above 0"),
        ({"budget_bytes": -1}, r"budget_bytes=-1: must be bytes above 0"),
        ({"target_los": 3.0}, r'target_los: there is no such setting in a grid; did you mean "target_loss"\?'),
        ({"methods": []}, r"\[\[methods\]\]: this list of tables is missing"),
        ({"methods": [{"algorithm": FEDAVG}]}, r"methods\[1\].label=None: must be a name"),
        ({"methods": [{"label": "…", "algorithm": FEDAVG}]}, r'"…": a label needs a letter or a digit'),
        ({"methods": [{"label": "A b"}, {"label": "a B"}]}, r'"a B" and "A b" share a folder'),
        ({"methods": [{"label": "A", "clients": {}}]}, r"methods\[1\].clients: all methods of a grid play the same"),
        ({"methods": [{"label": "A", "seed": 3}]}, r"methods\[1\].seed: all methods of a grid play the same task"),
        ({"methods": [{"label": "A", "round": 3}]}, r'methods\[1\].round: there .* did you mean "rounds"\?'),
        ({"methods": [{"label": "A", "grid": {"rounds": 3}}]}, r'grid."rounds"=3: must be a list of values'),
        ({"methods": [{"label": "A", "grid": {"text.packed": [True]}}]}, r'grid."text.packed": all methods of a grid'),
        ({"methods": [{"label": "A", "grid": {"algorithm.x": [1]}}]}, r"A, x=1: algorithm.x: there is no such setting"),
        ({"methods": [{"label": "A", "algorithm": {"name": "fedavgg"}}]}, r'A: no method is called "fedavgg"'),
        ({"methods": [{"label": "A", "algorithm": 3}]}, r"methods.algorithm=3: must be a table"),
    ],
)
def test_what_is_no_grid_is_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": FEDAVG})
    tables["algorithm"] |= FEDAVG
    with pytest.raises(UserError, match=message) as refused:
        resolve({**tables, **change})
    assert "\n" not in str(refused.value)


def test_only_takes_rows_and_whole_entries(tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": FEDAVG, "B": FERRET})
    tables["methods"][1]["grid"] = {"algorithm.bits": [1, 8]}
    grid = resolve(tables)
    assert [row.label for row in grid.chosen([])] == ["A", "B, bits=1", "B, bits=8"]
    assert [row.label for row in grid.chosen(["B"])] == ["B, bits=1", "B, bits=8"]
    assert [row.label for row in grid.chosen(["B, bits=8", "A"])] == ["A", "B, bits=8"]
    with pytest.raises(UserError, match='no method of this grid has the label "C": allowed: A, B'):
        grid.chosen(["C"])


# --- the same task for all


@dataclass(frozen=True)
class Recorded(ToyData):
    """Rows that remember in which batches they were handed out."""

    seen: list[bytes] = field(default_factory=list)

    def batches(self, size: int, key: Key) -> Iterator[Rows]:
        """As they are."""
        for rows in super().batches(size, key):
            self.seen.append(rows.x.numpy().tobytes())
            yield rows


REGISTERED = {method.name: method for method in reversed(METHODS.values()) if method.name in catalogue()}


@pytest.mark.parametrize("name", catalogue())
def test_a_client_s_batches_follow_from_seed_round_and_client_alone_whatever_the_method(name: str) -> None:
    rounds, size = 2, 4
    method = REGISTERED[name]
    assert method.training.batch_size == size  # type: ignore[attr-defined]
    clients: dict[str, Any] = {client: Recorded(data.x, data.y) for client, data in toy_clients().items()}  # type: ignore[attr-defined]
    simulate(method, rounds, data=clients, seed=3)
    for client, data in clients.items():
        taken, seen = len(data.seen) // rounds, list(data.seen)
        assert taken > 0
        orders = [endless(data, size, Key.of(3, "local", number, client).fold("train")) for number in (1, 2)]
        assert seen == [rows.x.numpy().tobytes() for order in orders for rows in itertools.islice(order, taken)]


def tasks(cells: list[Cell]) -> dict[Cell, Task]:
    return {cell: task_of(read(cell.folder)) for cell in cells}


def test_methods_of_a_grid_start_alike_and_a_run_on_changed_data_is_named(tmp_path: Path) -> None:
    grid = resolve(grid_tables(tmp_path, {"A": FEDAVG, "B": FERRET, "C": {"name": "fedprox"}}, seeds=[1]))
    *alike, late = grid.cells(tmp_path / "out")
    for cell in alike:
        run(cell.recipe, cell.folder, silent)
    rows = write_rows(tmp_path)
    rows.write_text(rows.read_text().replace("door", "gate"))
    run(late.recipe, late.folder, silent)
    assert differing(tasks(alike)) == {}
    ((cell, why),) = differing(tasks([*alike, late])).items()
    assert cell is late and why.startswith("was played on other data (")
    comparison = gather(grid, tmp_path / "out")
    assert [row.row.label for row in comparison.rows if row.runs] == sorted(
        ("A", "B"), key=lambda label: read_summary(cell_of(grid, tmp_path / "out", label, 1).folder)["eval_loss"][-1]
    )
    assert comparison.left_out == (f"C, seed 1 {why}",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "c" * 64}, r"started from other weights \(cccccccccccc… here, bbbbbbbbbbbb… in the others\)"),
        ({"data_fingerprint": "e" * 64}, r"was played on other data \(eeeeeeeeeeee… here"),
        ({"cohort": "zoe"}, r"sampled other clients than the others in round 1"),
    ],
)
def test_a_run_of_another_task_is_named_and_has_no_part_in_the_table(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    grid = written_grid(tmp_path, ["A", "B", "C"])
    for cell in grid.cells(tmp_path):
        odd = cell.row.label == "B" and cell.seed == 2
        write_cell(cell, {0: 5.0, 2: 4.0}, **(change if odd else {}))
    comparison = gather(grid, tmp_path)
    (line,) = comparison.left_out
    assert re.match(f"B, seed 2 {message}", line)
    assert {row.row.label: [run.cell.seed for run in row.runs] for row in comparison.rows} == {
        "A": [1, 2],
        "B": [1],
        "C": [1, 2],
    }
    assert f"* {line.replace('seed 2', 'seed 2: left out:')}" in as_markdown(comparison)


def test_a_comparison_that_had_to_leave_runs_out_fails_with_its_table_written(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"], seeds=[1])
    first, second = grid.cells(tmp_path)
    write_cell(first, {0: 5.0, 2: 4.0})
    write_cell(second, {0: 5.0, 2: 4.0}, base="c" * 64)
    with pytest.raises(RunError, match="left out of the table: B, seed 1 started from other weights"):
        compare(save(grid, tmp_path), tmp_path, table_only=True)
    assert "| A ◆ | 1 | 4.000 ± - |" in (tmp_path / "comparison.md").read_text()


def test_data_differ_between_seeds_and_weights_do_not(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"])
    for cell in grid.cells(tmp_path):
        write_cell(cell, {0: 5.0, 2: 4.0}, data_fingerprint=str(cell.seed) * 64, cohort=f"person {cell.seed}")
    assert differing(tasks(grid.cells(tmp_path))) == {}


def test_unlike_batches_and_threads_are_said(tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": FEDAVG, "B": {**FERRET, "training": {"batch_size": 8}}}, seeds=[1])
    grid = resolve(tables)
    for number, cell in enumerate(grid.cells(tmp_path), start=1):
        write_cell(cell, {0: 5.0, 2: 4.0}, threads=number)
    remarks = " ".join(gather(grid, tmp_path).remarks)
    assert "but in batches of different sizes: 4 (A); 8 (B)." in remarks
    assert "different numbers of threads" in remarks and "1 (A, seed 1); 2 (B, seed 1)." in remarks


# --- runs measured elsewhere


def two_places(tmp_path: Path, **begin: Any) -> tuple[Grid, Path, Path]:
    """Methods A and B, two seeds: `there` has A, both seeds, and B's first; `here` has B's second."""
    grid, here, there = written_grid(tmp_path, ["A", "B"]), tmp_path / "here", tmp_path / "there"
    for out, label, seed in ((there, "A", 1), (there, "A", 2), (there, "B", 1), (here, "B", 2)):
        out.mkdir(exist_ok=True)
        write_cell(cell_of(grid, out, label, seed), LOSSES[label, seed], EACH[label], **(begin if out == there else {}))
    save(grid, there), save(grid, here)
    compare(there / "grid.toml", there, table_only=True)
    return grid, here, there


def test_runs_measured_elsewhere_count_as_if_they_were_here_and_are_not_played_again(tmp_path: Path) -> None:
    _, here, there = two_places(tmp_path)
    rows = {row.row.label: row for row in compare(here / "grid.toml", here, also=[there])}  # nothing is left to play
    whole = rows_by_label(written(tmp_path / "whole"))
    for label, row in rows.items():
        measured = ("loss", "bytes", "bytes_up", "seconds_local", "rounds_to_target")
        for name in measured:
            assert row.mean[name] == pytest.approx(whole[label].mean[name], nan_ok=True)
        assert [tuple(point) for point in row.curve()] == [tuple(point) for point in whole[label].curve()]
    text = (here / "comparison.md").read_text()
    assert f"3 of the runs were measured elsewhere: {there}." in text and "waiting" not in text
    assert "runs/b/seed-2/report.html" in (here / "comparison.html").read_text()
    assert "runs/a/seed-1/report.html" not in (here / "comparison.html").read_text()
    again = {row.row.label: row for row in compare(here / "grid.toml", tmp_path / "third", also=[here])}
    assert again["A"].mean["loss"] == rows["A"].mean["loss"], "what was taken over can be taken over"


def test_a_run_measured_elsewhere_on_another_task_is_named(tmp_path: Path) -> None:
    _, here, there = two_places(tmp_path, base="c" * 64)
    with pytest.raises(RunError, match="left out of the table: B, seed 2 started from other weights"):
        compare(here / "grid.toml", here, also=[there], table_only=True)  # the three agree, the one does not


def test_a_run_measured_elsewhere_with_other_settings_is_not_taken(tmp_path: Path) -> None:
    _, here, there = two_places(tmp_path)
    tables = tomllib.loads((there / "grid.toml").read_text())
    tables["methods"][0]["algorithm"]["training"] = {"learning_rate": 0.7}
    (there / "grid.toml").write_text(tomli_w.dumps(tables))
    rows = {row.row.label: row for row in compare(here / "grid.toml", here, also=[there], table_only=True)}
    assert not rows["A"].runs and [run.cell.seed for run in rows["B"].runs] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda there: (there / "comparison.json").unlink(), "comparison.json is missing"),
        (lambda there: (there / "comparison.json").write_text("{"), "comparison.json cannot be read"),
        (
            lambda there: (there / "comparison.json").write_text(
                (there / "comparison.json").read_text().replace('"task"', '"tusk"')
            ),
            "A, seed 1 has no 'task'; an older fedferret wrote it",
        ),
    ],
)
def test_another_folder_that_is_none_is_one_line(change: Any, message: str, tmp_path: Path) -> None:
    _, here, there = two_places(tmp_path)
    change(there)
    with pytest.raises(UserError, match=message) as refused:
        compare(here / "grid.toml", here, also=[there], table_only=True)
    assert "\n" not in str(refused.value)


# --- the figures


def save(grid: Grid, folder: Path) -> Path:
    """The grid as a file."""
    path = folder / "grid.toml"
    path.write_text(grid.to_toml())
    return path


LOSSES = {
    ("A", 1): {0: 5.0, 1: 4.0, 2: 3.0},
    ("A", 2): {0: 5.2, 1: 4.4, 2: 3.2},
    ("B", 1): {0: 5.0, 1: 4.5, 2: 4.0},
    ("B", 2): {0: 5.2, 1: 4.5, 2: 3.7},
}
EACH = {"A": 1000, "B": 10}


def written(tmp_path: Path, **changes: Any) -> Comparison:
    """Two methods and two seeds with the losses above; method A moves a hundred times as much."""
    grid = written_grid(tmp_path, ["A", "B"], **changes)
    for (label, seed), losses in LOSSES.items():
        write_cell(cell_of(grid, tmp_path, label, seed), losses, EACH[label])
    return gather(grid, tmp_path)


def rows_by_label(comparison: Comparison) -> dict[str, RowResult]:
    return {row.row.label: row for row in comparison.rows}


def test_figures_are_means_and_sample_deviations_over_seeds(tmp_path: Path) -> None:
    rows = rows_by_label(written(tmp_path))
    assert list(rows) == ["A", "B"]  # the lowest loss first
    assert rows["A"].mean["loss"] == pytest.approx(3.1)
    assert rows["B"].deviation["loss"] == pytest.approx(statistics.stdev([4.0, 3.7]))
    for label, each in EACH.items():
        mean = rows[label].mean
        assert (mean["bytes_up"], mean["bytes_down"]) == (each, each)  # a client and round
        assert mean["bytes"] == 2 * 2 * each  # one place: two ways, two rounds
        assert mean["bytes_up_all_clients"] == mean["bytes_down_all_clients"] == 2 * 2 * each
        assert mean["seconds_local"] == 2 * 2 and mean["seconds_overhead"] == 2 * 3
        assert mean["peak_memory_bytes"] > 1e7
    assert rows["A"].curve()[1] == pytest.approx((1, 4.2, 2000, 5.0))
    assert rows["A"].band() == [(5.0, 5.2), (4.0, 4.4), (3.0, 3.2)]


def test_the_target_is_nine_tenths_of_the_best_gain_or_what_the_grid_says(tmp_path: Path) -> None:
    usual = written(tmp_path / "usual")
    assert usual.target == pytest.approx(5.1 - 0.9 * (5.1 - 3.1))
    assert rows_by_label(usual)["A"].mean["rounds_to_target"] == 2
    assert math.isnan(rows_by_label(usual)["B"].mean["rounds_to_target"])
    given = rows_by_label(written(tmp_path / "given", target_loss=4.0))
    assert given["A"].mean["rounds_to_target"] == 1.5 and given["A"].mean["bytes_to_target"] == 3000
    assert given["B"].mean["rounds_to_target"] == 2
    partly = written(tmp_path / "partly", target_loss=3.9)
    line = next(line for line in as_markdown(partly).splitlines() if line.startswith("| B"))
    assert line.count("reached by 1 of 2") == 2


def test_a_budget_buys_the_loss_of_the_last_evaluation_within_it(tmp_path: Path) -> None:
    one_round = rows_by_label(written(tmp_path / "one", budget_bytes=2000))
    assert one_round["A"].mean["loss_in_budget"] == pytest.approx(4.2)  # a round costs it 2,000
    assert one_round["B"].mean["loss_in_budget"] == pytest.approx(3.85)  # and B 20: it played to its end
    nothing = rows_by_label(written(tmp_path / "none", budget_bytes=1999))
    assert nothing["A"].mean["loss_in_budget"] == pytest.approx(5.1)
    assert "loss within 2.00 KB" in as_markdown(written(tmp_path / "shown", budget_bytes=2000))
    assert "loss within" not in as_markdown(written(tmp_path / "plain"))


def test_a_prompt_that_starts_worse_does_not_move_the_usual_target(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"], seeds=[1])
    write_cell(cell_of(grid, tmp_path, "A", 1), {0: 5.0, 2: 4.0})
    write_cell(cell_of(grid, tmp_path, "B", 1), {0: 9.0, 2: 4.5})
    assert gather(grid, tmp_path).target == pytest.approx(4.1)


def test_without_a_gain_there_is_no_target(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A"], seeds=[1])
    write_cell(cell_of(grid, tmp_path, "A", 1), {0: 5.0, 2: 5.5})
    comparison = gather(grid, tmp_path)
    assert comparison.target is None and "Target: none" in as_markdown(comparison)


def test_the_front_is_who_nobody_beats_in_both(tmp_path: Path) -> None:
    final = {"cheap": (10, 4.5), "good": (100, 4.0), "beaten": (100, 4.2), "best": (1000, 3.5), "dear": (2000, 3.6)}
    grid = written_grid(tmp_path, list(final), seeds=[1])
    for label, (each, loss) in final.items():
        write_cell(cell_of(grid, tmp_path, label, 1), {0: 5.0, 2: loss}, each)
    assert {row.row.label for row in gather(grid, tmp_path).rows if row.in_front} == {"cheap", "good", "best"}


def test_a_failed_seed_is_told_and_has_no_part_in_the_means(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"])
    write_cell(cell_of(grid, tmp_path, "A", 1), {0: 5.0, 2: 4.0})
    note(cell_of(grid, tmp_path, "A", 2), Outcome("diverged", "round 1: 0 clients answered"), 1, 2.0)
    write_cell(cell_of(grid, tmp_path, "B", 1), {0: 5.0, 2: math.nan})
    comparison = gather(grid, tmp_path)
    rows = rows_by_label(comparison)
    assert rows["A"].loss == 4.0 and list(rows) == ["A", "B"] and comparison.over == 3
    text = as_markdown(comparison)
    assert "| A ◆ | 1 of 2 | 4.000 ± - |" in text and "| B | 0 of 2 | diverged, waiting |" in text
    assert "* A, seed 2: diverged: round 1: 0 clients answered\n" in text
    assert "* B, seed 1: diverged: the held-out loss is not finite\n* B, seed 2: waiting\n" in text


def test_the_tables_say_the_same(tmp_path: Path) -> None:
    comparison = written(tmp_path)
    plain = json.loads(as_json(comparison))
    lines = list(csv.DictReader(as_csv(comparison).splitlines()))
    for row, kept, line in zip(comparison.rows, plain["rows"], lines, strict=True):
        assert kept["method"] == line["method"] == row.row.label
        for name, value in row.mean.items():
            assert kept["mean"][name] == (None if math.isnan(value) else value)
            assert line[name] == ("" if math.isnan(value) else repr(value))
        assert len(kept["runs"]) == 2 and kept["runs"][0]["curve"][0]["round"] == 0
        assert (tmp_path / kept["runs"][0]["folder"] / "events.jsonl").exists()
    header, rule, *rows = [line for line in as_markdown(comparison).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1 and len(rows) == 2
    assert "3.100 ± 0.141" in rows[0]


# --- the command


def fedferret(*words: str | Path, code: int = 0) -> str:
    """Run a command in this process; returns what it wrote."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_the_table_alone_and_a_dry_run_play_nothing(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"])
    path, out = save(grid, tmp_path), tmp_path / "out"
    write_cell(cell_of(grid, out, "A", 1), {0: 5.0, 2: 4.0})
    write_cell(cell_of(grid, out, "A", 2), {0: 5.0, 2: 4.0})
    (out / "grid.toml").write_text(path.read_text())
    before = sorted(out.rglob("*"))
    said = fedferret("compare", path, "--out", out, "--dry-run")
    assert sorted(out.rglob("*")) == before
    assert "A: 2 rounds, 362 KB up" in said and "seed 1 finished, seed 2 finished" in said
    assert "seed 1 waiting" in said and "Left to play: about" in said
    assert "4.000" in fedferret("compare", path, "--out", out, "--table-only")
    assert (out / "comparison.html").exists() and not (out / "runs" / "b").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "rounds=none"], "rounds='none': must be a whole number"),
        (["--only", "Z"], 'no method of this grid has the label "Z"'),
        (["--jobs", "0"], "jobs=0: must be at least 1"),
        (["--set", "text.template=nowhere.txt"], "A: "),
    ],
)
def test_a_mistake_is_refused_before_any_work(words: list[str], message: str, tmp_path: Path) -> None:
    path = save(written_grid(tmp_path, ["A"]), tmp_path)
    said = fedferret("compare", path, "--out", tmp_path / "out", *words, code=2)
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_or_of_other_runs_is_refused(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A"])
    path, out = save(grid, tmp_path), tmp_path / "out"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    assert "holds no grid" in fedferret("compare", path, "--out", tmp_path / "thesis", code=2)
    write_cell(cell_of(grid, out, "A", 1), {0: 5.0, 2: 4.0})
    (out / "grid.toml").write_text("")
    said = fedferret("compare", path, "--out", out, "--set", "rounds=7", code=2)
    assert "holds a run with another rounds (2 there, 7 here)" in said
    with FileLock(out / ".lock"):
        assert "is being played by another process" in fedferret("compare", path, "--out", out, "--table-only", code=2)


# --- processes


def start_grid(path: Path, out: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, so that it can be stopped."""
    program = "from fedferret.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, "compare", str(path), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children would ignore it
    )


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    """Wait for it while the process lives."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def soon(condition: Any) -> None:
    """Wait for it, but not for ever."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def figures(recipe: Recipe, folder: Path) -> list[Any]:
    """What must be equal for two runs to be the same."""
    summary = read_summary(folder)
    assert len(summary["eval_loss"]) == recipe.rounds + 1
    return [summary[name] for name in ("eval_loss", "train_loss_by_round", "bytes_up_by_round", "bytes_down_by_round")]


@pytest.mark.slow
def test_a_grid_plays_what_its_recipes_say_and_outlives_a_run_that_cannot_go_on(tmp_path: Path) -> None:
    hopeless = {"name": "fedavg", "training": {"learning_rate": 1e30, "clip": "none"}}
    grid = resolve(grid_tables(tmp_path, {"hopeless": hopeless, "A": FEDAVG, "B": FERRET}, seeds=[1]))
    path, out = save(grid, tmp_path), tmp_path / "out"
    bad, a, b = grid.cells(out)
    rows = compare(path, out, jobs=2)
    assert [row.row.label for row in rows][-1] == "hopeless" and len(rows) == 3
    now = standing(bad)
    assert now.state == "diverged" and now.reason.startswith("round 1: 0 clients answered, 1 are needed (")
    assert "Resuming" not in output_of(a).read_text()
    for cell in (a, b):
        run(cell.recipe, tmp_path / "plain" / cell.row.slug, silent)
        assert figures(cell.recipe, cell.folder) == figures(cell.recipe, tmp_path / "plain" / cell.row.slug)
        (part,) = json.loads(record_of(cell).read_text())["parts"]
        assert part["outcome"] == "finished" and part["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    records = {cell: record_of(cell).read_bytes() for cell in (bad, a, b)}
    assert compare(path, out)[0].mean == rows[0].mean
    assert {cell: record_of(cell).read_bytes() for cell in (bad, a, b)} == records  # nothing was played again
    compare(path, out, retry_failed=True)
    changed = [cell for cell, before in records.items() if record_of(cell).read_bytes() != before]
    assert changed == [bad] and len(json.loads(record_of(bad).read_text())["parts"]) == 2


@pytest.mark.slow
def test_ctrl_c_leaves_a_grid_that_the_same_command_goes_on_with(tmp_path: Path) -> None:
    grid = resolve(grid_tables(tmp_path, {"A": FEDAVG, "B": FERRET}, seeds=[1], rounds=12))
    path, out = save(grid, tmp_path), tmp_path / "out"
    first, second = grid.cells(out)
    process = start_grid(path, out)
    until(lambda: (first.folder / "log").exists(), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("fedferret: stopped with 0 of 2 runs done; the same command goes on")
    assert standing(first).state == "unfinished" and standing(second).state == "waiting"
    assert read_summary(first.folder)["status"] == "interrupted"
    assert (out / "comparison.html").exists()
    rows = compare(path, out)
    assert [len(row.runs) for row in rows] == [1, 1]
    assert "Resuming after round" in output_of(first).read_text()
    run(first.recipe, tmp_path / "whole", silent)
    assert figures(first.recipe, first.folder) == figures(first.recipe, tmp_path / "whole")


@pytest.mark.slow
def test_no_run_outlives_its_grid_s_process(tmp_path: Path) -> None:
    grid = resolve(grid_tables(tmp_path, {"A": FEDAVG}, seeds=[1], rounds=500))
    path, out = save(grid, tmp_path), tmp_path / "out"
    (cell,) = grid.cells(out)
    process = start_grid(path, out)
    until(lambda: (cell.folder / "log").exists(), process)
    playing = Path("/proc") / str(player(cell.folder))
    process.kill()
    process.communicate()
    assert standing(cell).state == "unfinished"
    soon(lambda: not playing.exists())


@pytest.mark.slow
@pytest.mark.parametrize("forks", [True, False])
def test_a_worker_tells_how_a_run_ended_even_a_killed_one(forks: bool, tmp_path: Path) -> None:
    worker = Worker(threads=1, forks=forks)
    quick, long = (tiny_recipe(tmp_path, rounds=rounds) for rounds in (1, 500))
    try:
        worker.start(quick.to_toml(), tmp_path / "quick", tmp_path / "quick.txt")
        assert worker.finish() == Outcome("finished")
        assert "round 1/1" in (tmp_path / "quick.txt").read_text()
        worker.start(quick.to_toml(), tmp_path / "rows.jsonl", tmp_path / "again.txt")  # which is no folder
        refused = worker.finish()
        assert refused.outcome == "failed" and "is no run folder: choose another one" in refused.reason
        worker.start(long.to_toml(), tmp_path / "long", tmp_path / "long.txt")
        soon(lambda: (tmp_path / "long" / "log").exists())
        os.kill(player(tmp_path / "long"), signal.SIGKILL)
        assert worker.finish() == Outcome("failed", "its process was ended by SIGKILL, memory may have run out")
        worker.start(long.to_toml(), tmp_path / "long", tmp_path / "again.txt")
        soon(lambda: forks or "Resuming" in (tmp_path / "again.txt").read_text())
        worker.interrupt()  # a worker that forks knows what to do before there is a run
        assert worker.finish() == Outcome("interrupted")
    finally:
        worker.close()


def player(folder: Path) -> int:
    """The newest process of those that write what a run prints."""
    output = folder.with_suffix(".txt")
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and os.access(process / "fd", os.R_OK):
            try:
                if Path(os.readlink(process / "fd" / "1")) == output:
                    found.append(int(process.name))
            except OSError:
                continue
    return max(found)
