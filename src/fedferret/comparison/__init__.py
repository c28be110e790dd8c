"""Several methods on one task: a grid of runs, a table of losses and costs, and a page with the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedferret.comparison.results import RowResult


def compare(
    grid: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    jobs: int = 1,
    retry_failed: bool = False,
    table_only: bool = False,
    also: Sequence[str | Path] = (),
) -> list[RowResult]:
    """Run the unfinished part of a grid, and write its table and page.

    Args:
        grid: the grid file.
        out: the folder for the runs, the table and the page.
        overrides: settings of the base, such as ``"rounds=5"``.
        only: labels of the methods or rows to run; all if empty.
        jobs: runs at a time.
        retry_failed: run failed and diverged runs again.
        table_only: run nothing.
        also: other folders of this grid. Their runs are imported instead of run.
    Returns:
        The rows of the table, the lowest loss first.
    Raises:
        UserError: for an invalid grid or a folder of fedferret 0.1, before any work.
        Interrupted: after Ctrl-C.
        RunError: if the table leaves out runs of another task.
    """
    from fedferret.comparison.commands import compare as compare_grid  # imports torch

    folders = [Path(folder) for folder in also]
    return compare_grid(Path(grid), Path(out), overrides, only, jobs, retry_failed, table_only, folders)
