"""``fedferret compare``: resolve and check the grid, run its unfinished cells, write the table and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text

from fedferret.build import check
from fedferret.comparison import grid as grids
from fedferret.comparison.comparability import differing, remarks
from fedferret.comparison.grid import Cell, Grid
from fedferret.comparison.imported_runs import import_runs
from fedferret.comparison.page import write_page
from fedferret.comparison.results import Comparison, RowResult, RunResult, result_of, rows_of, target_of
from fedferret.comparison.run_grid import run_grid
from fedferret.comparison.run_status import RunStatus, run_status
from fedferret.comparison.table import as_rich, missing_runs, notes, write_tables
from fedferret.core.errors import RunError, UserError
from fedferret.core.files import check_place, inside, write_atomically
from fedferret.estimate import Estimate, estimate
from fedferret.recipe_file import read_tables
from fedferret.run_folder import as_begun, belongs
from fedferret.tracking.console import plain_console
from fedferret.tracking.events import check_format
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
    """Carry out ``fedferret.comparison.compare``, with the same arguments.

    Args:
        path: the grid file.
        out: the folder for the runs, the table and the page.
        overrides: settings of the base.
        only: labels of the methods or rows to run; all if empty.
        jobs: runs at a time.
        retry_failed: run failed and diverged runs again.
        table_only: run nothing.
        also: folders with runs to import.
        console: for progress and the table; standard output by default.
    Returns:
        The rows of the table, the lowest loss first.
    Raises:
        UserError: for an invalid grid or a folder of fedferret 0.1, before any work.
        Interrupted: after Ctrl-C.
        RunError: if the table leaves out runs of another task.
    """
    console = console or plain_console()
    if jobs < 1:
        raise UserError(f"jobs={jobs}: must be at least 1")
    check_place(out)
    grid = resolve(path, out, overrides)
    chosen, imported = grid.chosen(only), import_runs(grid, out, also)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        with lock:
            write_atomically(out / FILE, grid.to_toml())
            try:
                if not table_only:
                    cells = [cell for cell in grid.cells(out) if cell.row in chosen and cell.name not in imported]
                    run_grid([cell for cell in cells if is_left(cell, retry_failed)], jobs, console)
            finally:
                comparison = gather(grid, out, imported)
                write_tables(comparison)
                write_page(comparison)
    except Timeout:
        raise UserError(f"{out} is in use by another process: wait for it, or give another folder") from None
    show(comparison, console)
    if comparison.left_out:
        raise RunError(
            f"left out of the table: {'; '.join(comparison.left_out)}; to repeat such a run, delete its folder"
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
    """Print the runs of a grid, their status, and the cost of the unfinished ones. Writes no file.

    Args:
        path: the grid file.
        out: the folder of the runs.
        overrides: settings of the base.
        only: labels of the methods or rows; all if empty.
        also: folders with runs to import.
        console: standard output by default.
    Raises:
        UserError: for an invalid grid or a folder of fedferret 0.1.
    """
    console = console or plain_console()
    grid = resolve(path, out, overrides)
    chosen, imported, seconds = grid.chosen(only), import_runs(grid, out, also), 0.0
    for row in chosen:
        cells = [cell for cell in grid.cells(out) if cell.row is row and cell.name not in imported]
        if not cells:
            continue
        cost, left = estimate(row.recipe), [cell for cell in cells if is_left(cell, False)]
        seconds += cost.seconds * len(left)
        console.print(Text(_planned(cells, cost)), soft_wrap=True)
    console.print(f"Left to run: about {as_duration(seconds)}, one run at a time (a rough estimate)", soft_wrap=True)


def resolve(path: Path, out: Path, overrides: Sequence[str]) -> Grid:
    """The grid in a file, with every check that needs no training.

    Args:
        path: the grid file.
        out: the folder of the runs.
        overrides: settings of the base.

    Returns:
        The grid; nothing has been run.

    Raises:
        UserError: for an invalid grid, a folder with other contents, or runs of fedferret 0.1.
    """
    tables = read_tables(path, overrides)
    for folder in sorted(out.glob("runs/*/seed-*")):
        tables = as_begun(tables, folder)
    grid = grids.resolve(tables)
    for row in grid.rows:
        try:
            check(row.recipe)
        except UserError as error:
            raise UserError(f"{row.label}: {error}") from None
    if out.exists() and not (out / FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no grid: choose another folder with --out")
    inside(out, out / "plots")
    for cell in grid.cells(out):
        inside(out, cell.folder)
        check_format(cell.folder)
        belongs(cell.recipe, cell.folder)
    return grid


def is_left(cell: Cell, retry_failed: bool) -> bool:
    """Whether this cell is still to run.

    Args:
        cell: of the grid.
        retry_failed: also run a failed or diverged cell.

    Returns:
        False for a cell that is over, unless it is to be run again.
    """
    status = run_status(cell)
    return not status.over or (retry_failed and status.state != "finished")


def gather(grid: Grid, out: Path, imported: Mapping[str, RunResult] | None = None) -> Comparison:
    """The results of the grid so far.

    Args:
        grid: resolved.
        out: the folder of the runs.
        imported: results by cell name, used for cells that are not over in ``out``.

    Returns:
        Rows with the results that are there, and what is missing.

    Raises:
        UserError: if the event log of a finished run cannot be read.
    """
    cells = grid.cells(out)
    statuses = {cell: run_status(cell) for cell in cells}
    runs = {cell: result_of(cell, grid) for cell in cells if statuses[cell].state == "finished"}
    found = imported or {}
    runs |= {cell: found[cell.name] for cell in cells if cell.name in found and not statuses[cell].over}
    different = differing({cell: run.task for cell, run in runs.items()})
    comparable = {cell: runs[cell] for cell in cells if cell in runs and cell not in different}
    others = {cell: status for cell, status in statuses.items() if cell not in comparable}
    others |= {cell: RunStatus("left out", why) for cell, why in different.items()}
    target = target_of(grid, list(comparable.values()))
    rows = rows_of(grid, list(comparable.values()), others.items(), target)
    left_out = tuple(f"{cell.name} {why}" for cell, why in different.items())
    checks = (*remarks(list(comparable), statuses), *_origins(comparable))
    return Comparison(grid, out, tuple(rows), target, checks, left_out)


def _origins(runs: Mapping[Cell, RunResult]) -> list[str]:
    """A line for every folder that runs were imported from."""
    counts = Counter(str(run.imported_from) for run in runs.values() if run.imported_from)
    return [f"{count} of the runs were imported from {folder}." for folder, count in counts.items()]


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, its notes, and the path of the page.

    Args:
        comparison: to print.
        console: to print on.
    """
    wide = console if console.is_terminal else plain_console(console.file, 180)  # a file's lines may be long
    wide.print(as_rich(comparison))
    for line in (*notes(comparison), *comparison.remarks, *missing_runs(comparison)):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"Page: {comparison.out / 'comparison.html'}"), soft_wrap=True)


def _planned(cells: Sequence[Cell], cost: Estimate) -> str:
    states = ", ".join(f"seed {cell.seed} {run_status(cell).state}" for cell in cells)
    held = as_bytes(cost.client_state_bytes)
    disk = f"{held} of disk per participating client, " if cost.client_state_bytes else ""
    disk += f"{as_bytes(cost.server_bytes)} of disk for the log and the server, "
    return (
        f"{cells[0].row.label}: {cells[0].recipe.rounds} rounds, {as_bytes(cost.bytes_up)} up and "
        f"{as_bytes(cost.bytes_down)} down per client and round, {as_bytes(cost.memory)} of memory, {disk}"
        f"{as_duration(cost.seconds)} per run; {states}"
    )
