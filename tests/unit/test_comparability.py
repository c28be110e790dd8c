"""The runs of a comparison have the same task, imported runs too."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from contract.methods import METHODS
from fedferret.algorithms.registry import catalogue
from fedferret.comparison import compare
from fedferret.comparison.commands import gather, plan
from fedferret.comparison.comparability import Task, differing, task_of
from fedferret.comparison.grid import Cell, Grid, resolve
from fedferret.comparison.table import as_markdown
from fedferret.core.errors import RunError, UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import endless
from fedferret.runner import run
from fedferret.tracking.events import FILE, read
from fedferret.tracking.summary import read_summary
from tiny_runs import silent, write_rows
from toys import Rows, ToyData, simulate, toy_clients
from unit.written_grid import (
    EACH,
    FEDAVG,
    FERRET,
    LOSSES,
    cell_of,
    grid_tables,
    rows_by_label,
    save,
    write_cell,
    written,
    written_grid,
)
from unit.written_run import downgrade


@dataclass(frozen=True)
class Recorded(ToyData):
    """Rows that record the batches of training: statistics are read in the data's order, without a key."""

    seen: list[bytes] = field(default_factory=list)

    def batches(self, size: int, key: Key | None) -> Iterator[Rows]:
        """The unchanged batches."""
        for rows in super().batches(size, key):
            if key is not None:
                self.seen.append(rows.x.numpy().tobytes())
            yield rows


REGISTERED: dict[str, Any] = {
    method.name: method for method in reversed(METHODS.values()) if method.name in catalogue()
}
# layers are scored on other batches, a curriculum leaves examples out, and stages may train for another time
REGISTERED["fibecfed"] = replace(REGISTERED["fibecfed"], layers=1.0, curriculum_start=1.0)
REGISTERED["fedpeptao"] = replace(REGISTERED["fedpeptao"], layers=1.0)
REGISTERED["fedlog"] = replace(REGISTERED["fedlog"], start="random")  # it trains in round 1 too
REGISTERED["fed-sb"] = replace(
    REGISTERED["fed-sb"], initialisation="random", first_step=0.0
)  # a set-up round takes gradients
REGISTERED["fedrep"] = replace(REGISTERED["fedrep"], head_times=0)  # the head is trained on further batches
REGISTERED["sa-fedlora"] = replace(REGISTERED["sa-fedlora"], full_training=REGISTERED["sa-fedlora"].training)


@pytest.mark.parametrize("name", [name for name, method in REGISTERED.items() if hasattr(method, "training")])
def test_seed_round_and_client_alone_determine_a_client_s_batches_for_every_method(name: str) -> None:
    rounds, size = 2, 4
    method = REGISTERED[name]
    assert method.training.batch_size == size
    clients: dict[str, Any] = {client: Recorded(data.x, data.y) for client, data in toy_clients().items()}  # type: ignore[attr-defined]
    simulate(method, rounds, data=clients, seed=3)
    for client, data in clients.items():
        count, seen = len(data.seen) // rounds, list(data.seen)
        assert count > 0
        orders = [endless(data, size, Key.of(3, "local", number, client).fold("train")) for number in (1, 2)]
        assert seen == [rows.x.numpy().tobytes() for order in orders for rows in itertools.islice(order, count)]


def tasks(cells: list[Cell]) -> dict[Cell, Task]:
    return {cell: task_of(read(cell.folder)) for cell in cells}


def test_methods_of_a_grid_have_the_same_task_and_a_run_on_changed_data_is_named(tmp_path: Path) -> None:
    grid = resolve(grid_tables(tmp_path, {"A": FEDAVG, "B": FERRET, "C": {"name": "fedprox"}}, seeds=[1]))
    *comparable, late = grid.cells(tmp_path / "out")
    for cell in comparable:
        run(cell.recipe, cell.folder, silent)
    rows = write_rows(tmp_path)
    rows.write_text(rows.read_text().replace("door", "gate"))
    run(late.recipe, late.folder, silent)
    assert differing(tasks(comparable)) == {}
    ((cell, why),) = differing(tasks([*comparable, late])).items()
    assert cell is late and why.startswith("has other data (")
    comparison = gather(grid, tmp_path / "out")
    assert [row.row.label for row in comparison.rows if row.runs] == sorted(
        ("A", "B"), key=lambda label: read_summary(cell_of(grid, tmp_path / "out", label, 1).folder)["eval_loss"][-1]
    )
    assert comparison.left_out == (f"C, seed 1 {why}",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "c" * 64}, r"started from other weights \(cccccccccccc… here, bbbbbbbbbbbb… in the others\)"),
        ({"data_fingerprint": "e" * 64}, r"has other data \(eeeeeeeeeeee… here"),
        ({"cohort": "zoe"}, r"sampled other clients than the others in round 1"),
    ],
)
def test_a_run_of_another_task_is_named_and_left_out_of_the_table(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    grid = written_grid(tmp_path, ["A", "B", "C"])
    for cell in grid.cells(tmp_path):
        other = cell.row.label == "B" and cell.seed == 2
        write_cell(cell, {0: 5.0, 2: 4.0}, **(change if other else {}))
    comparison = gather(grid, tmp_path)
    (line,) = comparison.left_out
    assert re.match(f"B, seed 2 {message}", line)
    assert {row.row.label: [run.cell.seed for run in row.runs] for row in comparison.rows} == {
        "A": [1, 2],
        "B": [1],
        "C": [1, 2],
    }
    assert f"* {line.replace('seed 2', 'seed 2: left out:')}" in as_markdown(comparison)


def test_a_comparison_that_leaves_runs_out_writes_the_table_and_fails(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"], seeds=[1])
    first, second = grid.cells(tmp_path)
    write_cell(first, {0: 5.0, 2: 4.0})
    write_cell(second, {0: 5.0, 2: 4.0}, base="c" * 64)
    with pytest.raises(RunError, match="left out of the table: B, seed 1 started from other weights"):
        compare(save(grid, tmp_path), tmp_path, table_only=True)
    assert "| A ◆ | 1 | 4.000 ± - |" in (tmp_path / "comparison.md").read_text()


def test_data_may_differ_between_seeds(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"])
    for cell in grid.cells(tmp_path):
        write_cell(cell, {0: 5.0, 2: 4.0}, data_fingerprint=str(cell.seed) * 64, cohort=f"person {cell.seed}")
    assert differing(tasks(grid.cells(tmp_path))) == {}


def test_different_batch_sizes_and_threads_are_reported(tmp_path: Path) -> None:
    tables = grid_tables(tmp_path, {"A": FEDAVG, "B": {**FERRET, "training": {"batch_size": 8}}}, seeds=[1])
    grid = resolve(tables)
    for number, cell in enumerate(grid.cells(tmp_path), start=1):
        write_cell(cell, {0: 5.0, 2: 4.0}, threads=number)
    remarks = " ".join(gather(grid, tmp_path).remarks)
    assert "Batch sizes differ: 4 (A); 8 (B)." in remarks
    assert "Numbers of threads differ" in remarks and "1 (A, seed 1); 2 (B, seed 1)." in remarks


# --- imported runs


def two_folders(tmp_path: Path, **changes: Any) -> tuple[Grid, Path, Path]:
    """Methods A and B, two seeds: `there` has A, both seeds, and B's first; `here` has B's second.

    ``changes`` are fields of the start events in `there`.
    """
    grid, here, there = written_grid(tmp_path, ["A", "B"]), tmp_path / "here", tmp_path / "there"
    for out, label, seed in ((there, "A", 1), (there, "A", 2), (there, "B", 1), (here, "B", 2)):
        out.mkdir(exist_ok=True)
        fields = changes if out == there else {}
        write_cell(cell_of(grid, out, label, seed), LOSSES[label, seed], EACH[label], **fields)
    save(grid, there), save(grid, here)
    compare(there / "grid.toml", there, table_only=True)
    return grid, here, there


def test_imported_runs_count_like_runs_of_the_folder_and_are_not_repeated(tmp_path: Path) -> None:
    _, here, there = two_folders(tmp_path)
    rows = {row.row.label: row for row in compare(here / "grid.toml", here, also=[there])}  # nothing is left to run
    whole = rows_by_label(written(tmp_path / "whole"))
    for label, row in rows.items():
        for name in ("loss", "bytes", "bytes_up", "seconds_local", "rounds_to_target"):
            assert row.mean[name] == pytest.approx(whole[label].mean[name], nan_ok=True)
        assert [tuple(point) for point in row.curve()] == [tuple(point) for point in whole[label].curve()]
    text = (here / "comparison.md").read_text()
    assert f"3 of the runs were imported from {there}." in text and "waiting" not in text
    assert "runs/b/seed-2/report.html" in (here / "comparison.html").read_text()
    assert "runs/a/seed-1/report.html" not in (here / "comparison.html").read_text()
    again = {row.row.label: row for row in compare(here / "grid.toml", tmp_path / "third", also=[here])}
    assert again["A"].mean["loss"] == rows["A"].mean["loss"], "an imported run can be imported again"


def test_runs_of_fedferret_0_1_are_refused_before_any_work_and_can_be_imported(tmp_path: Path) -> None:
    grid, here, there = two_folders(tmp_path)
    log = cell_of(grid, there, "A", 1).folder / FILE
    downgrade(log.parent)
    line = f'{log} was written by fedferret 0.1; pip install "fedferret==0.1.*" reads it'
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    for command in (
        lambda: compare(there / "grid.toml", there),
        lambda: compare(there / "grid.toml", there, table_only=True),
        lambda: plan(there / "grid.toml", there, [], []),
    ):
        with pytest.raises(UserError) as refused:
            command()
        assert str(refused.value) == line
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before
    rows = {row.row.label: row for row in compare(here / "grid.toml", here, also=[there], table_only=True)}
    assert [run.cell.seed for run in rows["A"].runs] == [1, 2]


def test_an_imported_run_of_another_task_is_named(tmp_path: Path) -> None:
    _, here, there = two_folders(tmp_path, base="c" * 64)
    with pytest.raises(RunError, match="left out of the table: B, seed 2 started from other weights"):
        compare(here / "grid.toml", here, also=[there], table_only=True)  # the three agree, the one does not


def test_a_run_with_other_settings_is_not_imported(tmp_path: Path) -> None:
    _, here, there = two_folders(tmp_path)
    tables = tomllib.loads((there / "grid.toml").read_text())
    tables["methods"][0]["algorithm"]["training"] = {"learning_rate": 0.7}
    (there / "grid.toml").write_text(tomli_w.dumps(tables))
    rows = {row.row.label: row for row in compare(here / "grid.toml", here, also=[there], table_only=True)}
    assert not rows["A"].runs and [run.cell.seed for run in rows["B"].runs] == [1, 2]


def test_a_run_on_another_device_is_imported(tmp_path: Path) -> None:
    _, here, there = two_folders(tmp_path)
    tables = tomllib.loads((there / "grid.toml").read_text())
    tables["execution"] = {"device": "cuda"}
    (there / "grid.toml").write_text(tomli_w.dumps(tables))
    rows = {row.row.label: row for row in compare(here / "grid.toml", here, also=[there], table_only=True)}
    assert [run.cell.seed for run in rows["A"].runs] == [1, 2]


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
def test_a_folder_without_a_comparison_is_refused_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    _, here, there = two_folders(tmp_path)
    change(there)
    with pytest.raises(UserError, match=message) as refused:
        compare(here / "grid.toml", here, also=[there], table_only=True)
    assert "\n" not in str(refused.value)
