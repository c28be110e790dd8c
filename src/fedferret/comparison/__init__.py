"""Several methods on one task: a grid of runs, a table of what each cost and reached, a page to look at."""

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
    """Play what is left of the grid in the file ``grid``, and write its table and page into the folder ``out``.

    ``overrides`` are settings of the base such as ``"rounds=5"``; ``only`` names the rows to play, ``jobs`` is how many
    runs play at once; ``also`` are other such folders, whose runs need not be played here. Returns the table's rows,
    the lowest loss first. Raises UserError for a wrong grid before any work, Interrupted after Ctrl-C, RunError for
    runs that the table had to leave out because their task was another.
    """
    from fedferret.comparison.commands import compare as carry_out  # torch is imported when there is work

    folders = [Path(folder) for folder in also]
    return carry_out(Path(grid), Path(out), overrides, only, jobs, retry_failed, table_only, folders)
