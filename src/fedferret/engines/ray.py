"""Ray actors as a transport: a simulation on many machines, or on one with fractions of its devices.

Each actor holds one trainer with a model that is loaded once, and handles one message at a time. Messages are bytes of
the codec. A lost actor is replaced, and its client's work is done again (``workers.py``).

On one machine every Ray process listens on loopback; dashboard and usage reports are off. ``RAY_ADDRESS`` in the
environment joins a running cluster; the cluster's owner decides who may reach it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from fedferret.core.errors import RunError, UserError
from fedferret.engines.workers import Lost, Workers

OFF = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker without a device still sees the machine's devices
    "RAY_worker_niceness": "0",  # Ray's default, 15, lets every other process on the machine come first
}
# Ray has no setting for loopback. With this variable it takes 127.0.0.1 as its address, as on other systems, and binds
# nothing else; the argument _node_ip_address alone is turned back into the machine's address (2.60). Ray's processes
# read the variable; this process has the constant that an earlier import of Ray made from it (``_on_loopback``).
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
STARTS = 3  # tries to start Ray, which gives up on a busy machine
OBJECT_STORE = 256 << 20  # bytes of shared memory: messages in transit, no model weights


class Handler(Protocol):
    """What an actor holds: ``handle`` returns the response to a request, both encoded."""

    def handle(self, message: bytes) -> bytes: ...


class Resident:
    """The actor's class: a trainer for any client."""

    def __init__(self, make_trainer: Callable[[], Handler]) -> None:
        self._trainer = make_trainer()

    def handle(self, message: bytes) -> bytes:
        """Return the response to a request, both encoded."""
        return self._trainer.handle(message)


class RayWorkers(Workers):
    """A transport over Ray actors."""

    def __init__(
        self, count: int, make_trainer: Callable[[], Handler], *, cpus: float = 1.0, gpus: float = 0.0
    ) -> None:
        """Start Ray, or join the cluster at ``RAY_ADDRESS``.

        Args:
            count: number of actors.
            make_trainer: called in each actor; by reference, so a function of a module or a partial of one.
            cpus: reserved by an actor; fractions are allowed.
            gpus: reserved by an actor; fractions are allowed.
        Raises:
            UserError: if Ray is not installed.
            RunError: if Ray does not start.
        """
        super().__init__([f"worker-{number}" for number in range(1, count + 1)])
        joins = bool(os.environ.get("RAY_ADDRESS"))
        for name, value in (OFF if joins else OFF | LOOPBACK).items():
            os.environ.setdefault(name, value)  # read when ray is imported and started
        try:
            import ray
        except ImportError:
            raise UserError('execution.engine="ray" needs Ray: pip install "fedferret[ray]"') from None
        self._ray, self._make_trainer = ray, make_trainer
        self._started = not ray.is_initialized()
        if self._started:
            machine: dict[str, Any] = {
                "address": "local",
                "num_cpus": max(1, math.ceil(count * cpus)),
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "object_store_memory": OBJECT_STORE,
            }
            with nullcontext() if joins else _on_loopback(ray):
                self._start({} if joins else machine)
        self._actor = ray.remote(Resident).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
        self._actors: dict[str, Any] = {}
        self._sent: dict[Any, str] = {}  # handle: worker

    def _start(self, machine: dict[str, Any]) -> None:
        for attempt in range(1, STARTS + 1):
            try:
                self._ray.init(log_to_driver=False, logging_level=logging.ERROR, **machine)
                return
            except Exception as error:  # Ray raises Exception if it is not up after 30 seconds, which cannot be set
                self._ray.shutdown()
                if attempt == STARTS:
                    raise RunError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from error

    def send(self, worker: str, message: bytes, timeout: float) -> Any:
        """See Workers."""
        if worker not in self._actors:
            self._actors[worker] = self._actor.remote(self._make_trainer)
        handle = self._actors[worker].handle.remote(message)
        self._sent[handle] = worker
        return handle

    def wait(self, handles: Collection[Any], timeout: float) -> Collection[Any]:
        """See Workers."""
        done: list[Any] = self._ray.wait(list(handles), num_returns=1, timeout=timeout)[0]
        return done

    def result(self, handle: Any) -> bytes:
        """See Workers."""
        worker = self._sent.pop(handle)
        try:
            content: bytes = self._ray.get(handle)
            return content
        except self._ray.exceptions.RayError as error:
            self.abandon(worker)
            raise Lost(f"its worker was lost ({' '.join(str(error).split())[:200]})") from None

    def abandon(self, worker: str) -> None:
        """See Workers."""
        if actor := self._actors.pop(worker, None):
            self._ray.kill(actor)

    def close(self) -> None:
        """See Workers."""
        for worker in list(self._actors):
            self.abandon(worker)
        if self._started:
            self._ray.shutdown()


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Make Ray start on 127.0.0.1 only, even if Ray was imported before."""
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
