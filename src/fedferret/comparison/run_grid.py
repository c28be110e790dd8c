"""Run cells of a grid, one or several at a time, each in a separate process.

Every run has cores / jobs threads. A failure is recorded, and the other runs continue.
After Ctrl-C every busy run stops and leaves a resumable folder. The same command then continues.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fedferret.comparison.grid import Cell
from fedferret.comparison.run_status import output_of, record_outcome, run_status
from fedferret.comparison.worker import Outcome, Worker
from fedferret.runner import Interrupted
from fedferret.tracking.summary import read_summary
from fedferret.tracking.units import as_duration, as_loss


def run_grid(cells: Sequence[Cell], jobs: int, console: Console) -> None:
    """Run these cells.

    Args:
        cells: in the order of execution.
        jobs: runs at a time.
        console: for progress.
    Raises:
        Interrupted: after Ctrl-C.
    """
    if cells:
        jobs = min(jobs, len(cells))
        session = Session(cells, [Worker(threads_of(jobs)) for _ in range(jobs)], threads_of(jobs), console)
        session.run()


def threads_of(jobs: int) -> int:
    """The number of threads of a run if ``jobs`` runs share the machine.

    Args:
        jobs: at least 1.

    Returns:
        At least 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


class Session:
    """One execution of the command.

    Args:
        cells: in the order of execution.
        workers: one per job.
        threads: of each run.
        console: for progress.
    """

    def __init__(self, cells: Sequence[Cell], workers: Sequence[Worker], threads: int, console: Console) -> None:
        self._cells, self._workers, self._threads = cells, workers, threads
        self._waiting = deque(cells)
        self._busy: dict[Worker, tuple[Cell, float]] = {}  # the run's cell and start time
        self._over = 0
        self._console = console
        self._live = Live(self, console=console, refresh_per_second=1, transient=True)
        self._started = time.monotonic()

    def run(self) -> None:
        """Run all cells.

        Raises:
            Interrupted: after Ctrl-C.
        """
        if self._console.is_terminal:
            self._live.start()
        try:
            self._work()
        except KeyboardInterrupt:
            for worker in self._busy:
                worker.interrupt()
            self._log("Stopping: busy runs finish what they are writing. Ctrl-C again ends them at once.")
            self._wait_for_the_busy()
            done = sum(run_status(cell).over for cell in self._cells)
            raise Interrupted(
                f"stopped with {done} of {len(self._cells)} runs done; the same command continues from there"
            ) from None
        finally:
            for worker in self._workers:
                worker.close()
            if self._console.is_terminal:
                self._live.stop()

    def _work(self) -> None:
        idle = list(self._workers)
        while self._waiting or self._busy:
            while self._waiting and idle:
                self._begin(idle.pop(), self._waiting.popleft())
            ready, _, _ = select.select(list(self._busy), [], [])
            for worker in ready:
                self._end(worker)
                idle.append(worker)

    def _wait_for_the_busy(self) -> None:
        while self._busy:
            ready, _, _ = select.select(list(self._busy), [], [])
            for worker in ready:
                cell, started = self._busy.pop(worker)
                outcome = worker.finish()
                if outcome.outcome == "failed":  # after an interrupt this is not the run's fault
                    outcome = Outcome("interrupted")
                record_outcome(cell, outcome, self._threads, time.monotonic() - started)

    def _begin(self, worker: Worker, cell: Cell) -> None:
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        self._busy[worker] = (cell, time.monotonic())
        worker.start(cell.recipe.to_toml(), cell.folder, output_of(cell))

    def _end(self, worker: Worker) -> None:
        cell, started = self._busy.pop(worker)
        outcome, seconds = worker.finish(), time.monotonic() - started
        record_outcome(cell, outcome, self._threads, seconds)
        self._over += 1
        status = run_status(cell)
        result = f"loss {_loss(cell)}" if status.state == "finished" else str(status)
        self._log(
            f"[{self._over}/{len(self._cells)}] {cell.name}: {result}, {as_duration(seconds)}; {self._time_left()}"
        )

    def _time_left(self) -> str:
        left = len(self._cells) - self._over
        spent = time.monotonic() - self._started
        return f"about {as_duration(spent / self._over * left)} left" if left else "done"

    def _log(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)  # Text: a label is never read as markup

    def __rich__(self) -> Group:
        """A line for every busy run."""
        lines = []
        for cell, started in list(self._busy.values()):
            summary = read_summary(cell.folder)
            reached = f"round {summary.get('rounds', 0)}/{cell.recipe.rounds}"
            spent = as_duration(time.monotonic() - started)
            lines.append(Text(f"{cell.name}: {reached}, loss {_loss(cell)}, {spent}", no_wrap=True))
        return Group(*lines)


def _loss(cell: Cell) -> str:
    losses = [loss for loss in read_summary(cell.folder).get("eval_loss", []) if loss is not None]
    return as_loss(losses[-1] if losses else float("nan"))
