"""Local processes that answer letters: who takes which, what happens to a lost one. Shared by `processes` and `ray`.

    letters to a worker's own name go to that worker; all others to whichever is free
    a worker that is lost is replaced, and its letter sent again, at most three times
    a worker that is silent until the deadline is replaced too, where any may take its place

How a worker is started, asked and ended is the subclass's.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fedferret.engines.transport import Received

SENDINGS = 3  # of one letter: one that ends three processes is itself the cause


class Lost(Exception):
    """A worker that ended, or cannot be started, and why."""


class Workers(ABC):
    """A transport over processes that it started."""

    def __init__(self, workers: Sequence[str]) -> None:
        self.workers = tuple(workers)

    @abstractmethod
    def ask(self, worker: str, message: bytes, timeout: float) -> Any:
        """Send the letter, starting the worker if need be; returns at once with a handle for ``wait``."""

    @abstractmethod
    def wait(self, handles: Collection[Any], timeout: float) -> Collection[Any]:
        """Those handles that have come to an end, as soon as one has; none after ``timeout`` seconds."""

    @abstractmethod
    def result(self, handle: Any) -> bytes:
        """What came back. Raises Lost; TimeoutError where nothing did in time."""

    @abstractmethod
    def abandon(self, worker: str) -> None:
        """End a worker; it is started anew when it is next asked."""

    @abstractmethod
    def close(self) -> None:
        """End all of them and leave nothing behind."""

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        """See ``Transport.exchange``."""
        end = time.monotonic() + deadline
        waiting = list(messages)
        tried: Counter[str] = Counter()
        busy: dict[Any, tuple[str, str]] = {}  # handle: worker, addressee
        while (waiting or busy) and time.monotonic() < end:
            for worker, name in self._pairs(waiting, {worker for worker, _ in busy.values()}):
                waiting.remove(name)
                busy[self.ask(worker, messages[name], end - time.monotonic())] = worker, name
            for handle in self.wait(list(busy), max(0.0, end - time.monotonic())):
                _, name = busy.pop(handle)
                try:
                    yield Received(name, self.result(handle))
                except TimeoutError:
                    yield Received(name, None, f"no answer within {deadline:,.0f} s")
                except Lost as error:
                    tried[name] += 1
                    if tried[name] < SENDINGS and time.monotonic() < end:
                        waiting.insert(0, name)
                    else:
                        yield Received(name, None, f"{error}, {tried[name]} times" if tried[name] > 1 else str(error))
        for worker, name in busy.values():
            if name != worker:  # a named one may be a site that is only slow, and it has a log of its own
                self.abandon(worker)
        for name in [*(name for _, name in busy.values()), *waiting]:
            yield Received(name, None, f"no answer within {deadline:,.0f} s")

    def _pairs(self, waiting: Sequence[str], busy: Collection[str]) -> Iterator[tuple[str, str]]:
        """Free workers and the letters they may take, each at most once."""
        free = [worker for worker in self.workers if worker not in busy]
        for name in list(waiting):
            takers = [name] if name in self.workers else free
            if takers and takers[0] in free:
                yield takers[0], name
                free.remove(takers[0])
