"""Worker processes as a transport: which worker takes which message, and what follows a lost one.

    a message addressed to a worker by name goes to that worker; all others go to any free worker
    a lost worker is replaced, and its message sent again, at most three times in all
    a worker that does not reply by the deadline is replaced too, unless the message was addressed to it by name

The subclasses (`processes`, `ray`) start workers, send to them, and end them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fedferret.engines.transport import Received

SENDINGS = 3  # of one message: a message that ends three processes is itself the cause


class Lost(Exception):
    """A worker ended or cannot be started; the text has the reason."""


class Workers(ABC):
    """A transport over processes that it starts."""

    def __init__(self, workers: Sequence[str]) -> None:
        self.workers = tuple(workers)

    @abstractmethod
    def send(self, worker: str, message: bytes, timeout: float) -> Any:
        """Send a message, starting the worker if necessary, and return at once.

        Args:
            worker: name.
            message: bytes.
            timeout: seconds until the exchange is given up.
        Returns:
            A handle for ``wait`` and ``result``.
        """

    @abstractmethod
    def wait(self, handles: Collection[Any], timeout: float) -> Collection[Any]:
        """Wait for the first exchanges to end.

        Args:
            handles: from ``send``.
            timeout: seconds.
        Returns:
            The handles of the ended exchanges; none after ``timeout`` seconds.
        """

    @abstractmethod
    def result(self, handle: Any) -> bytes:
        """Return the reply of an ended exchange.

        Raises:
            Lost: if the worker ended or did not start.
            TimeoutError: if there was no reply in time.
        """

    @abstractmethod
    def abandon(self, worker: str) -> None:
        """End a worker; the next message to it starts a new one."""

    @abstractmethod
    def close(self) -> None:
        """End all workers and remove their temporary files."""

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        """Send each message, and yield replies as they come; see ``Transport.exchange``.

        Args:
            messages: bytes by addressee: a worker, or a client that any worker can take.
            deadline: seconds.
        """
        end = time.monotonic() + deadline
        waiting = list(messages)
        tried: Counter[str] = Counter()
        busy: dict[Any, tuple[str, str]] = {}  # handle: worker, addressee
        while (waiting or busy) and time.monotonic() < end:
            for worker, name in self._pairs(waiting, {worker for worker, _ in busy.values()}):
                waiting.remove(name)
                busy[self.send(worker, messages[name], end - time.monotonic())] = worker, name
            for handle in self.wait(list(busy), max(0.0, end - time.monotonic())):
                _, name = busy.pop(handle)
                try:
                    yield Received(name, self.result(handle))
                except TimeoutError:
                    yield Received(name, None, f"no reply within {deadline:,.0f} s")
                except Lost as error:
                    tried[name] += 1
                    if tried[name] < SENDINGS and time.monotonic() < end:
                        waiting.insert(0, name)
                    else:
                        yield Received(name, None, f"{error}, {tried[name]} times" if tried[name] > 1 else str(error))
        for worker, name in busy.values():
            if name != worker:  # a worker addressed by name may be a slow site, with a log to lose
                self.abandon(worker)
        for name in [*(name for _, name in busy.values()), *waiting]:
            yield Received(name, None, f"no reply within {deadline:,.0f} s")

    def _pairs(self, waiting: Sequence[str], busy: Collection[str]) -> Iterator[tuple[str, str]]:
        """Free workers with the messages for them, each at most once."""
        free = [worker for worker in self.workers if worker not in busy]
        for name in list(waiting):
            takers = [name] if name in self.workers else free
            if takers and takers[0] in free:
                yield takers[0], name
                free.remove(takers[0])
