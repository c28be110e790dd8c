"""The figures of a comparison are right, and equal in all its tables."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

import pytest

from fedferret.comparison.commands import gather
from fedferret.comparison.grid import resolve
from fedferret.comparison.imported_runs import import_runs
from fedferret.comparison.plots import draw
from fedferret.comparison.run_status import record_outcome
from fedferret.comparison.table import as_csv, as_json, as_markdown
from fedferret.comparison.worker import Outcome
from fedferret.core.errors import UserError
from fedferret.tracking.events import EventLog
from unit.written_grid import (
    EACH,
    cell_of,
    grid_tables,
    rows_by_label,
    write_cell,
    written,
    written_grid,
)


def test_figures_are_means_and_sample_deviations_over_seeds(tmp_path: Path) -> None:
    rows = rows_by_label(written(tmp_path))
    assert list(rows) == ["A", "B"]  # the lowest loss first
    assert rows["A"].mean["loss"] == pytest.approx(3.1)
    assert rows["B"].deviation["loss"] == pytest.approx(statistics.stdev([4.0, 3.7]))
    for label, each in EACH.items():
        mean = rows[label].mean
        assert (mean["bytes_up"], mean["bytes_down"]) == (each, each)  # per client and round
        assert mean["bytes"] == 2 * 2 * each  # per sampled client: up and down, two rounds
        assert mean["bytes_up_all_clients"] == mean["bytes_down_all_clients"] == 2 * 2 * each
        assert mean["seconds_local"] == 2 * 2 and mean["seconds_overhead"] == 2 * 3
        assert mean["peak_memory_bytes"] > 1e7
    assert rows["A"].curve()[1] == pytest.approx((1, 4.2, 2000, 5.0, 4.2))
    assert rows["A"].band() == [(5.0, 5.2), (4.0, 4.4), (3.0, 3.2)]


def test_the_target_is_nine_tenths_of_the_best_loss_reduction_or_the_grid_s(tmp_path: Path) -> None:
    default = written(tmp_path / "default")
    assert default.target == pytest.approx(5.1 - 0.9 * (5.1 - 3.1))
    assert rows_by_label(default)["A"].mean["rounds_to_target"] == 2
    assert math.isnan(rows_by_label(default)["B"].mean["rounds_to_target"])
    given = rows_by_label(written(tmp_path / "given", target_loss=4.0))
    assert given["A"].mean["rounds_to_target"] == 1.5 and given["A"].mean["bytes_to_target"] == 3000
    assert given["B"].mean["rounds_to_target"] == 2
    partly = written(tmp_path / "partly", target_loss=3.9)
    line = next(line for line in as_markdown(partly).splitlines() if line.startswith("| B"))
    assert line.count("reached by 1 of 2") == 2


def test_the_loss_in_the_budget_is_that_of_the_last_evaluation_within_it(tmp_path: Path) -> None:
    one_round = rows_by_label(written(tmp_path / "one", budget_bytes=2000))
    assert one_round["A"].mean["loss_in_budget"] == pytest.approx(4.2)  # a round takes 2,000 bytes
    assert one_round["B"].mean["loss_in_budget"] == pytest.approx(3.85)  # a round takes 20 bytes: the final loss
    nothing = rows_by_label(written(tmp_path / "none", budget_bytes=1999))
    assert nothing["A"].mean["loss_in_budget"] == pytest.approx(5.1)
    assert "loss within 2.00 KB" in as_markdown(written(tmp_path / "shown", budget_bytes=2000))
    assert "loss within" not in as_markdown(written(tmp_path / "plain"))


def test_a_row_with_a_higher_untuned_loss_does_not_change_the_default_target(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"], seeds=[1])
    write_cell(cell_of(grid, tmp_path, "A", 1), {0: 5.0, 2: 4.0})
    write_cell(cell_of(grid, tmp_path, "B", 1), {0: 9.0, 2: 4.5})
    assert gather(grid, tmp_path).target == pytest.approx(4.1)


def test_without_a_loss_reduction_there_is_no_target(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A"], seeds=[1])
    write_cell(cell_of(grid, tmp_path, "A", 1), {0: 5.0, 2: 5.5})
    comparison = gather(grid, tmp_path)
    assert comparison.target is None and "Target: none" in as_markdown(comparison)


def test_rows_that_no_other_row_dominates_are_pareto_optimal(tmp_path: Path) -> None:
    final = {"small": (10, 4.5), "good": (100, 4.0), "worse": (100, 4.2), "best": (1000, 3.5), "large": (2000, 3.6)}
    grid = written_grid(tmp_path, list(final), seeds=[1])
    for label, (each, loss) in final.items():
        write_cell(cell_of(grid, tmp_path, label, 1), {0: 5.0, 2: loss}, each)
    assert {row.row.label for row in gather(grid, tmp_path).rows if row.pareto_optimal} == {"small", "good", "best"}


def test_classifiers_are_ranked_and_stopped_by_accuracy(tmp_path: Path) -> None:
    """A confident classifier can have the higher accuracy and the higher loss."""
    given = {"model": {"name": "lenet5"}, "data": {"source": "digits"}, "text": {}, "seeds": [1]}
    grid = written_grid(tmp_path, ["A", "B"], **given)
    for label, each, losses, accuracies in (
        ("A", 10, {0: 2.3, 1: 0.5, 2: 0.4}, {0: 0.1, 1: 0.6, 2: 0.7}),
        ("B", 100, {0: 2.3, 1: 0.9, 2: 0.8}, {0: 0.1, 1: 0.85, 2: 0.9}),
    ):
        cell = cell_of(grid, tmp_path, label, 1)
        write_cell(cell, losses, each, accuracies=accuracies)
        spread = {"client-mean": 0.5, "worst-tenth": 0.25}
        EventLog(cell.folder).write("baseline", name="local-only", loss=1.5, per_client={}, spread=spread)
    comparison = gather(grid, tmp_path)
    rows = rows_by_label(comparison)
    assert list(rows) == ["B", "A"]  # the highest accuracy first
    assert comparison.target == pytest.approx(0.1 + 0.9 * (0.9 - 0.1))
    assert rows["B"].mean["rounds_to_target"] == 1 and math.isnan(rows["A"].mean["rounds_to_target"])
    assert all(row.pareto_optimal for row in comparison.rows)  # A has fewer bytes, B the higher accuracy
    assert rows["A"].mean["local-only loss"] == 1.5 and rows["A"].mean["local-only worst-tenth"] == 0.25
    text = as_markdown(comparison)
    assert "Rows are sorted by accuracy" in text and "Target: accuracy 0.820" in text and "nats per example" in text
    assert {plot.name for plot in draw(comparison)} >= {"accuracy-by-round", "front"}
    with pytest.raises(UserError, match=r"target_loss=1.0: these runs are judged by accuracy; give target alone"):
        written_grid(tmp_path / "refused", ["A"], target_loss=1.0, **given)


def test_personal_models_are_ranked_beside_global_ones_by_what_their_clients_hold_out(tmp_path: Path) -> None:
    """Accuracy of personal models is of other examples than that of a global one, so it is in no column."""
    methods = {"Global": {"name": "fedavg"}, "Own": {"name": "local-only"}}
    task = {"model": {"name": "lenet5"}, "data": {"source": "digits"}, "text": {}, "seeds": [1]}
    grid = resolve(grid_tables(tmp_path, methods, **task))
    for label, each, accuracies, means in (
        ("Global", 100, {0: 0.1, 1: 0.7, 2: 0.8}, {0: 0.1, 1: 0.6, 2: 0.7}),
        ("Own", 1, {0: 0.1, 1: 0.99, 2: 0.99}, {0: 0.1, 1: 0.8, 2: 0.9}),
    ):
        losses = {0: 2.3, 1: 0.5, 2: 0.25}
        write_cell(cell_of(grid, tmp_path, label, 1), losses, each, accuracies=accuracies, means=means)
    comparison = gather(grid, tmp_path)
    rows, text = rows_by_label(comparison), as_markdown(comparison)
    assert list(rows) == ["Own", "Global"] and comparison.target == pytest.approx(0.1 + 0.9 * (0.9 - 0.1))
    assert rows["Own"].pareto_optimal and not rows["Global"].pareto_optimal
    assert [point.score for point in rows["Global"].curve()] == [0.1, 0.6, 0.7]
    own, other = (next(line for line in text.splitlines() if f"| {label}" in line) for label in ("Own", "Global"))
    assert own.count("| no global model |") == 1 and own.count("no global model") == 2 and "0.990" not in own
    assert "0.250" in other and "0.800" in other and "0.700" in other and "no global model" not in other
    assert "Rows are sorted by client-mean" in text and "No global model: every client has its own" in text
    assert json.loads(as_json(comparison))["rows"][0]["mean"]["accuracy"] is None
    assert as_csv(comparison).splitlines()[1].startswith("Own,1,1,1,")

    alone = resolve(grid_tables(tmp_path, {"Own": methods["Own"]}, **task))  # then all rows are of the same examples
    assert alone.figure == "accuracy" and "0.990" in as_markdown(gather(alone, tmp_path))
    off = resolve(grid_tables(tmp_path, methods, **task, evaluation={"per_client": False}))
    unranked = gather(off, tmp_path)
    assert [(row.row.label, row.pareto_optimal) for row in unranked.rows] == [("Global", True), ("Own", False)]
    assert "set evaluation.per_client = true to rank all rows" in as_markdown(unranked)
    (tmp_path / "comparison.json").write_text(as_json(comparison))
    (tmp_path / "grid.toml").write_text(grid.to_toml())
    with pytest.raises(UserError, match="its rows are ranked by client-mean, and those of this grid by accuracy"):
        import_runs(alone, tmp_path / "other", [tmp_path])


def test_a_failed_seed_is_reported_and_left_out_of_the_means(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"])
    write_cell(cell_of(grid, tmp_path, "A", 1), {0: 5.0, 2: 4.0})
    record_outcome(cell_of(grid, tmp_path, "A", 2), Outcome("diverged", "round 1: 0 clients replied"), 1, 2.0)
    write_cell(cell_of(grid, tmp_path, "B", 1), {0: 5.0, 2: math.nan})
    comparison = gather(grid, tmp_path)
    rows = rows_by_label(comparison)
    assert rows["A"].score == 4.0 and list(rows) == ["A", "B"] and comparison.over == 3
    text = as_markdown(comparison)
    assert "| A ◆ | 1 of 2 | 4.000 ± - |" in text and "| B | 0 of 2 | diverged, waiting |" in text
    assert "* A, seed 2: diverged: round 1: 0 clients replied\n" in text
    assert "* B, seed 1: diverged: the held-out loss is not finite\n* B, seed 2: waiting\n" in text


def test_all_tables_have_the_same_values(tmp_path: Path) -> None:
    comparison = written(tmp_path)
    plain = json.loads(as_json(comparison))
    lines = list(csv.DictReader(as_csv(comparison).splitlines()))
    for row, entry, line in zip(comparison.rows, plain["rows"], lines, strict=True):
        assert entry["method"] == line["method"] == row.row.label
        for name, value in row.mean.items():
            assert entry["mean"][name] == (None if math.isnan(value) else value)
            assert line[name] == ("" if math.isnan(value) else repr(value))
        assert len(entry["runs"]) == 2 and entry["runs"][0]["curve"][0]["round"] == 0
        assert (tmp_path / entry["runs"][0]["folder"] / "events.jsonl").exists()
    header, rule, *rows = [line for line in as_markdown(comparison).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1 and len(rows) == 2
    assert "3.100 ± 0.141" in rows[0]
