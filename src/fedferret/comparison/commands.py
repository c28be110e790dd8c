"""What ``fedferret compare`` does: resolve and check the grid, play what is left, write the table and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text

from fedferret.comparison import grid as grids
from fedferret.comparison.comparability import differing, remarks
from fedferret.comparison.grid import Cell, Grid
from fedferret.comparison.imported_runs import measured
from fedferret.comparison.page import write_page
from fedferret.comparison.results import Comparison, RowResult, RunResult, measure, rows_of, target_of
from fedferret.comparison.run_grid import play
from fedferret.comparison.run_status import RunStatus, run_status
from fedferret.comparison.table import absences, as_rich, notes, write_tables
from fedferret.core.errors import RunError, UserError
from fedferret.core.files import write_atomically
from fedferret.estimate import Estimate, estimate
from fedferret.experiment import check
from fedferret.recipe_file import read_tables
from fedferret.runner import belongs
from fedferret.tracking.units import as_bytes, as_duration

FILE = "grid.toml"


def compare(
    path: Path,
    out: Path,
    overrides: Sequence[str],
    only: Sequence[str],
    jobs: int,
    retry_failed: bool,
    table_only: bool,
    also: Sequence[Path] = (),
    console: Console | None = None,
) -> list[RowResult]:
    """See ``fedferret.comparison.compare``."""
    console = console or Console()
    if jobs < 1:
        raise UserError(f"jobs={jobs}: must be at least 1")
    grid = resolve(path, out, overrides)
    chosen, imported_runs = grid.chosen(only), measured(grid, out, also)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        with lock:
            write_atomically(out / FILE, grid.to_toml())
            try:
                if not table_only:
                    cells = [cell for cell in grid.cells(out) if cell.row in chosen and cell.name not in imported_runs]
                    play([cell for cell in cells if is_left(cell, retry_failed)], jobs, console)
            finally:
                comparison = gather(grid, out, imported_runs)
                write_tables(comparison)
                write_page(comparison)
    except Timeout:
        raise UserError(f"{out} is being played by another process: wait for it, or give another folder") from None
    show(comparison, console)
    if comparison.left_out:
        raise RunError(
            f"left out of the table: {'; '.join(comparison.left_out)}; delete a run's folder and it is played again"
        )
    return list(comparison.rows)


def plan(
    path: Path,
    out: Path,
    overrides: Sequence[str],
    only: Sequence[str],
    also: Sequence[Path] = (),
    console: Console | None = None,
) -> None:
    """Show the runs of a grid, how far they are, and what is left will cost. Writes nothing."""
    console = console or Console()
    grid = resolve(path, out, overrides)
    chosen, imported_runs, seconds = grid.chosen(only), measured(grid, out, also), 0.0
    for row in chosen:
        cells = [cell for cell in grid.cells(out) if cell.row is row and cell.name not in imported_runs]
        if not cells:
            continue
        cost, left = estimate(row.recipe), [cell for cell in cells if is_left(cell, False)]
        seconds += cost.seconds * len(left)
        console.print(Text(_planned(cells, cost)), soft_wrap=True)
    console.print(f"Left to play: about {as_duration(seconds)}, one run at a time (a rough estimate)", soft_wrap=True)


def resolve(path: Path, out: Path, overrides: Sequence[str]) -> Grid:
    """The grid in a file, with everything checked that can be known before work. Raises UserError."""
    grid = grids.resolve(read_tables(path, overrides))
    for row in grid.rows:
        try:
            check(row.recipe)
        except UserError as error:
            raise UserError(f"{row.label}: {error}") from None
    if out.exists() and not (out / FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no grid: choose another folder with --out")
    for cell in grid.cells(out):
        belongs(cell.recipe, cell.folder)
    return grid


def is_left(cell: Cell, retry_failed: bool) -> bool:
    """Whether this cell is still to be played."""
    now = run_status(cell)
    return not now.over or (retry_failed and now.state != "finished")


def gather(grid: Grid, out: Path, imported_runs: Mapping[str, RunResult] | None = None) -> Comparison:
    """What the runs in the grid's folder say so far, and for cells that are not over here those measured elsewhere."""
    cells = grid.cells(out)
    statuses = {cell: run_status(cell) for cell in cells}
    runs = {cell: measure(cell) for cell in cells if statuses[cell].state == "finished"}
    taken = imported_runs or {}
    runs |= {cell: taken[cell.name] for cell in cells if cell.name in taken and not statuses[cell].over}
    unlike = differing({cell: run.task for cell, run in runs.items()})
    same = {cell: runs[cell] for cell in cells if cell in runs and cell not in unlike}
    others = {cell: now for cell, now in statuses.items() if cell not in same}
    others |= {cell: RunStatus("left out", why) for cell, why in unlike.items()}
    target = target_of(grid, list(same.values()))
    rows = rows_of(grid, list(same.values()), others.items(), target)
    left_out = tuple(f"{cell.name} {why}" for cell, why in unlike.items())
    return Comparison(grid, out, tuple(rows), target, (*remarks(list(same), statuses), *_origins(same)), left_out)


def _origins(runs: Mapping[Cell, RunResult]) -> list[str]:
    """A line on every other folder that runs were taken from."""
    counts = Counter(str(run.imported_runs) for run in runs.values() if run.imported_runs)
    return [f"{count} of the runs were measured elsewhere: {folder}." for folder, count in counts.items()]


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, what a reader has to know, and where the rest is."""
    wide = console if console.is_terminal else Console(file=console.file, width=180)  # a file's lines may be long
    wide.print(as_rich(comparison))
    for line in (*notes(comparison), *comparison.remarks, *absences(comparison)):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"Page: {comparison.out / 'comparison.html'}"), soft_wrap=True)


def _planned(cells: Sequence[Cell], cost: Estimate) -> str:
    states = ", ".join(f"seed {cell.seed} {run_status(cell).state}" for cell in cells)
    kept = f"{as_bytes(cost.bytes_kept)} of disk for each client that takes part, " if cost.bytes_kept else ""
    return (
        f"{cells[0].row.label}: {cells[0].recipe.rounds} rounds, {as_bytes(cost.bytes_up)} up and "
        f"{as_bytes(cost.bytes_down)} down a client and round, {as_bytes(cost.memory)} of memory, {kept}"
        f"{as_duration(cost.seconds)} a run; {states}"
    )
