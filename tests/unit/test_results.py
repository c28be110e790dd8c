"""docs/results.md has the results of the comparisons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from docs import update_results
from docs.behind import behind

from fedferret.comparison.commands import gather
from fedferret.comparison.page import write_page
from fedferret.comparison.table import as_json, write_tables
from fedferret.core.files import write_atomically
from unit.written_grid import cell_of, write_cell, written, written_grid

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_tables_of_the_results_match_the_comparisons(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "results", tmp_path / "results")
    page = tmp_path / "results.md"
    page.write_text((DOCS / "results.md").read_text())
    update_results.update(page)
    assert page.read_text() == (DOCS / "results.md").read_text()
    assert all(f"<!-- {path.name}:begin -->" in page.read_text() for path in (DOCS / "results").iterdir())


@pytest.mark.usefixtures("plots")
def test_a_comparison_becomes_a_table_of_the_results(tmp_path: Path) -> None:
    grid = written_grid(tmp_path / "two", ["A", "B"], seeds=[1])
    write_cell(cell_of(grid, tmp_path / "two", "A", 1), {0: 5.0, 2: 4.0}, each=1000)
    write_atomically(tmp_path / "two" / "grid.toml", grid.to_toml())
    comparison = gather(grid, tmp_path / "two")
    write_tables(comparison)
    write_page(comparison)
    update_results.take(tmp_path / "two", tmp_path / "results")
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- two:begin -->\nold\n<!-- two:end -->\nafter\n")
    update_results.update(page)
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert lines[4].startswith("| **A** | 1 | 4.000 | 1.00 KB | 1.00 KB | 4.00 KB |")
    assert len(lines) == 7  # B has no run
    assert "#fff" in (tmp_path / "results" / "two" / "loss-by-bytes.svg").read_text()


def test_every_row_is_compared_with_the_baseline_row_seed_by_seed(tmp_path: Path) -> None:
    comparison = json.loads(as_json(written(tmp_path)))
    first, second = behind(comparison, "B")
    assert first == (
        "A, seed 1: 0: 0.000 1: -0.500 2: -1.000; loss reduction relative to B 200.0%; "
        "level after 1 rounds and 5 s, B after 2 rounds and 10 s"
    )
    assert second.startswith("A, seed 2: ") and "relative to B 133.3%; level after 2 rounds" in second
    assert all(line.endswith("; never level") for line in behind(comparison, "A"))
