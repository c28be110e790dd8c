"""docs/results.md says what comparisons measured."""

from __future__ import annotations

import shutil
from pathlib import Path

from docs import update_results

from fedferret.comparison.commands import gather
from fedferret.comparison.page import write_page
from fedferret.comparison.table import write_tables
from fedferret.core.files import write_atomically
from unit.written_grid import cell_of, write_cell, written_grid

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_tables_of_the_results_are_what_was_measured(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "results", tmp_path / "results")
    page = tmp_path / "results.md"
    page.write_text((DOCS / "results.md").read_text())
    update_results.update(page)
    assert page.read_text() == (DOCS / "results.md").read_text()
    assert all(f"<!-- {path.name}:begin -->" in page.read_text() for path in (DOCS / "results").iterdir())


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
    assert len(lines) == 7  # B has not been played
    assert "#fff" in (tmp_path / "results" / "two" / "loss-by-bytes.svg").read_text()
