"""The in-process engine that stops at the first failing client and says everything about it.

It also holds every method to its contract: the public state that ``local`` was given must be bit-equal after.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedferret.core import tree
from fedferret.core.algorithm import Examples
from fedferret.core.errors import RunError
from fedferret.core.keys import Key
from fedferret.core.pooling import tensors
from fedferret.core.rounds import Failure, Job
from fedferret.engines.in_process import InProcess


class ClientError(RunError):
    """A client that failed: who, at what stage, on which data."""


class Debug(InProcess):
    """The engine for finding out why a client fails; same bits as in-process."""

    def work(self, job: Job, client: str, data: Examples) -> tuple[bytes, Any]:
        """In-process work on recorded data, with the public state checked before and after."""
        before = tree.digest(tensors(job.public))
        self._recorded = Recorded(data)
        result = super().work(job, client, self._recorded)
        if tree.digest(tensors(job.public)) != before:
            raise AssertionError(f"{job.algorithm.name}.local changed the public state")
        return result

    def failed(self, job: Job, client: str, stage: str, error: Exception) -> Failure:
        """Stop the run; the cause's traceback stays attached."""
        recorded = getattr(self, "_recorded", None)
        seen = recorded.describe() if recorded and stage == "local" else "no data was read"
        raise ClientError(
            f"client {client!r} failed in round {job.round}, stage {stage}: {type(error).__name__}: {error} ({seen})"
        ) from error


class Recorded:
    """A client's examples that remember the last batch they gave."""

    def __init__(self, data: Examples) -> None:
        self._data = data
        self._batches = 0
        self._last: Any = None

    def __len__(self) -> int:
        return len(self._data)

    def batches(self, size: int, key: Key) -> Iterator[Any]:
        """The same batches, remembered."""
        for batch in self._data.batches(size, key):
            self._batches, self._last = self._batches + 1, batch
            yield batch

    def describe(self) -> str:
        """How much was read, and what the last batch held."""
        if self._last is None:
            return f"{len(self)} examples, none read"
        return f"{len(self)} examples, failed at batch {self._batches}: {' '.join(repr(self._last).split()):.200}"
