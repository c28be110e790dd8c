"""Live progress on the terminal: round, client, step, loss, bytes so far, time left.

On a terminal: two lines that change in place, with messages scrolling above them. In a file or a pipe: one plain
line per message, evaluation and round. Time left = time so far · (1 − f)/f, where the done fraction f counts
rounds, clients within the round and steps within the client. rich can print a ``Progress``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import MappingProxyType, TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedferret.core.rounds import RoundRecord
from fedferret.core.text import printable_lines
from fedferret.tracking.console import plain_console
from fedferret.tracking.units import as_bytes, as_duration, as_loss


class Progress:
    """Shows the progress of a run. A context manager.

    The runner calls the methods as things happen. No method changes the run.

    Args:
        total_rounds: rounds in the recipe.
        done: rounds completed before this session.
        console: standard output by default.
    """

    def __init__(self, total_rounds: int, done: int = 0, console: Console | None = None) -> None:
        self._console = console or plain_console()
        self._total, self._first = total_rounds, done
        self._round = done + 1
        self._cohort_size = self._client = self._step = self._steps = 0
        self._name = self._label = ""
        self._aside: tuple[int, int] | None = None
        self._finished = 0.0  # rounds, of this session
        self._loss: float | None = None
        self._held_out: float | None = None
        self._bytes = 0
        self._started = time.monotonic()
        self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def round(self, number: int, cohort_size: int) -> None:
        """A round begins.

        Args:
            number: of the round, from 1.
            cohort_size: clients sampled.
        """
        self._round, self._cohort_size = number, cohort_size
        self._client = self._step = self._steps = 0
        self._name = ""

    def client(self, name: str, index: int) -> None:
        """A client begins its local training.

        Args:
            name: of the client.
            index: of the client within the round, from 0.
        """
        self._name, self._client = name, index
        self._label = f"client {index + 1}/{self._cohort_size}"
        self._step = self._steps = 0

    def aside(self, label: str, step: int, total: int) -> None:
        """Other work than a round: evaluation or a baseline.

        Args:
            label: what the work is.
            step: steps done.
            total: steps in all.
        """
        self._label, self._name, self._aside = label, "", (step, total)

    def end_aside(self) -> None:
        """The other work is over."""
        self._aside = None

    def step(self, step: int, total: int, loss: float) -> None:
        """A client has done one more step.

        Args:
            step: steps done.
            total: steps in all.
            loss: the newest known training loss, nats per token; NaN before the first.
        """
        self._step, self._steps, self._loss = step, total, loss

    def evaluated(self, round: int, loss: float, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        """The model was evaluated on the main held-out set.

        Args:
            round: the last completed round; 0 before tuning.
            loss: nats per token.
            metrics: other metrics to show, by name.
        """
        self._held_out = loss
        others = "".join(f", {name} {as_loss(value)}" for name, value in metrics.items())
        self.message(f"round {round}/{self._total}: held-out loss {as_loss(loss)}{others}")

    def message(self, text: str) -> None:
        """Print a line that stays.

        Args:
            text: one line; nothing in it is read as markup.
        """
        # Text: a name from the data is never read as markup
        self._console.print(Text(printable_lines(text, 1000)), soft_wrap=True)

    def finished_round(self, record: RoundRecord, bytes_so_far: int) -> None:
        """A round is over.

        Args:
            record: of the round.
            bytes_so_far: up and down, all clients, since round 1.
        """
        self._bytes = bytes_so_far
        self._finished = float(record.round - self._first)
        self._client, self._step, self._steps, self._name = 0, 0, 0, ""
        for failure in record.failures:
            self.message(f"round {record.round}: client {failure.client} failed ({failure.stage}): {failure.reason}")
        replied = len(record.cohort) - len(record.failures)
        self.message(
            f"round {record.round}/{self._total}: {replied} of {len(record.cohort)} clients replied in "
            f"{as_duration(record.seconds)}, {as_bytes(bytes_so_far)} so far, {self.time_left()}"
        )

    @property
    def fraction(self) -> float:
        """The done fraction of this session's rounds, between 0 and 1."""
        within_client = self._step / self._steps if self._steps else 0.0
        within_round = (self._client + within_client) / self._cohort_size if self._cohort_size else 0.0
        if self._round - self._first <= self._finished:  # between two rounds
            within_round = 0.0
        return min(1.0, (self._finished + within_round) / max(1, self._total - self._first))

    def time_left(self) -> str:
        """The time left, as text; unknown before the first step.

        Returns:
            Such as "4 min 12 s left", and "done" at the end.
        """
        fraction = self.fraction
        if not fraction:
            return "time left unknown"
        left = (time.monotonic() - self._started) * (1 - fraction) / fraction
        return f"{as_duration(left)} left" if fraction < 1 else "done"

    def __rich__(self) -> Group:
        """The two lines in their present state."""
        overall = (self._first + self.fraction * (self._total - self._first)) / max(1, self._total)
        rows = Table.grid(padding=(0, 2))
        held_out = "" if self._held_out is None else f"held-out loss {as_loss(self._held_out)}"
        rows.add_row(
            Text(f"round {self._round}/{self._total}", style="bold"),
            ProgressBar(total=1.0, completed=overall, width=24),
            Text("  ".join(filter(None, (held_out, as_bytes(self._bytes), self.time_left())))),
        )
        if self._aside is not None:
            done, total = self._aside
            bar = ProgressBar(total=max(1, total), completed=done, width=24)
            rows.add_row(Text(self._label), bar, Text(f"{done}/{total}"))
        elif self._name:
            loss = "" if self._loss is None or math.isnan(self._loss) else f"loss {as_loss(self._loss)}"
            step = f"step {self._step}/{self._steps}" if self._steps else ""
            rows.add_row(
                Text(self._label),
                ProgressBar(total=max(1, self._steps), completed=self._step, width=24),
                Text("  ".join(filter(None, (step, loss, self._name))), overflow="ellipsis", no_wrap=True),
            )
        return Group(rows)
