"""The in-process engine that stops at the first failing client and says everything about it.

It also holds every method to its contract: the public state that ``client_update`` was given must be bit-equal after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fedferret.core import tree
from fedferret.core.errors import RunError
from fedferret.core.exchanges import Body, Failure
from fedferret.core.keys import Key
from fedferret.core.pooling import tensors
from fedferret.core.rounds import RunState
from fedferret.core.task import Examples
from fedferret.engines.in_process import InProcess


class ClientError(RunError):
    """A client that failed: its name, the stage, and the data it had read."""


class Debug(InProcess):
    """The engine for finding out why a client fails; same bits as in-process."""

    def work(self, state: RunState, client: str, body: Body, data: Examples) -> tuple[Any, Any]:
        """In-process work on recorded data, with the public state checked before and after."""
        before = tree.digest(tensors(state.public))
        self._recorded = Recorded(data)
        result = super().work(state, client, body, self._recorded)
        if tree.digest(tensors(state.public)) != before:
            raise AssertionError(f"{state.node.algorithm.name}.client_update changed the public state")
        return result

    def failed(self, body: Body, client: str, stage: str, error: Exception) -> Failure:
        """Stop the run; the cause's traceback stays attached.

        Raises:
            ClientError: always.
        """
        recorded = getattr(self, "_recorded", None)
        seen = recorded.describe() if recorded and stage == "local" else "no data was read"
        raise ClientError(
            f"client {client!r} failed in round {body.round}, stage {stage}: {type(error).__name__}: {error} ({seen})"
        ) from error


class Recorded:
    """A client's examples that remember the last batch they gave."""

    def __init__(self, data: Examples) -> None:
        """Record nothing yet.

        Args:
            data: the client's examples, which are passed through.
        """
        self._data = data
        self._batches = 0
        self._last: Any = None

    def __len__(self) -> int:
        return len(self._data)

    def batches(self, size: int, key: Key | None) -> Iterator[Any]:
        """One pass over the examples; each batch is remembered.

        Args:
            size: examples of a batch, at most.
            key: draws the order; None gives the order of evaluation.

        Returns:
            The same batches as without recording.
        """
        for batch in self._data.batches(size, key):
            self._batches, self._last = self._batches + 1, batch
            yield batch

    def take(self, rows: Sequence[int]) -> Recorded:
        """Choose examples.

        Args:
            rows: indices from 0.

        Returns:
            The examples with these indices, in this order; what is read of them is recorded apart.
        """
        return Recorded(self._data.take(rows))

    def describe(self) -> str:
        """Say what the client had read when it failed.

        Returns:
            One line: how many examples the client holds, how many batches it read, and the last batch, cut to 200
            characters.
        """
        if self._last is None:
            return f"{len(self)} examples, none read"
        return f"{len(self)} examples, failed at batch {self._batches}: {' '.join(repr(self._last).split()):.200}"
