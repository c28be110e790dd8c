"""Ray actors as a transport: a simulation on many machines, or on one with fractions of its devices.

Each actor holds one trainer, its model loaded once, and is asked one letter at a time. The letters and receipts are the
codec's bytes. A lost actor is replaced and its client runs again (``workers.py``).

On one machine everything listens on loopback, without a dashboard, and usage reports are off. ``RAY_ADDRESS`` in the
environment joins a cluster that runs already; then its owner decides who may reach it.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import write_atomically
from fedferret.engines.workers import Lost, Workers

OFF = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker without a device keeps seeing what its machine has
    "RAY_worker_niceness": "0",  # 15 more, as Ray would have it, and whatever else the machine does comes first
}
# Ray has no setting for it: this is what makes it take 127.0.0.1 for its own address, as it does on other systems, and
# then bind nothing else; its argument _node_ip_address alone is turned back into the machine's address (2.60). Ray's
# processes read it from the environment, this one has the constant that an earlier import of Ray made of it
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
STARTS = 3  # of Ray, which gives up where a busy machine is slow
OBJECT_STORE = 256 << 20  # bytes of shared memory: letters in flight, no weights of ours


class Resident:
    """What runs in an actor: a trainer for any client."""

    def __init__(self, site_toml: str) -> None:
        from fedferret.engines.resident import open_trainer

        with tempfile.TemporaryDirectory() as name:
            write_atomically(Path(name) / "site.toml", site_toml)
            self._trainer = open_trainer(Path(name))

    def handle(self, message: bytes) -> bytes:
        """The receipt for an order."""
        return self._trainer.handle(message)


class RayWorkers(Workers):
    """A transport over actors."""

    def __init__(self, count: int, site_toml: str, *, cpus: float = 1.0, gpus: float = 0.0) -> None:
        """``cpus`` and ``gpus``: what an actor reserves, fractions allowed. Raises UserError without Ray."""
        super().__init__([f"worker-{number}" for number in range(1, count + 1)])
        joins = bool(os.environ.get("RAY_ADDRESS"))
        for name, value in (OFF if joins else OFF | LOOPBACK).items():
            os.environ.setdefault(name, value)  # read when ray is imported and started
        try:
            import ray
        except ImportError:
            raise UserError('execution.engine="ray" needs Ray: pip install "fedferret[ray]"') from None
        self._ray, self._site_toml = ray, site_toml
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
        self._asked: dict[Any, str] = {}

    def _start(self, machine: dict[str, Any]) -> None:
        for attempt in range(1, STARTS + 1):
            try:
                self._ray.init(log_to_driver=False, logging_level=logging.ERROR, **machine)
                return
            except Exception as error:  # a plain one where it is not up after 30 seconds, which Ray has no setting for
                self._ray.shutdown()
                if attempt == STARTS:
                    raise RunError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from error

    def ask(self, worker: str, message: bytes, timeout: float) -> Any:
        """See Workers."""
        if worker not in self._actors:
            self._actors[worker] = self._actor.remote(self._site_toml)
        handle = self._actors[worker].answer.remote(message)
        self._asked[handle] = worker
        return handle

    def wait(self, handles: Collection[Any], timeout: float) -> Collection[Any]:
        """See Workers."""
        done: list[Any] = self._ray.wait(list(handles), num_returns=1, timeout=timeout)[0]
        return done

    def result(self, handle: Any) -> bytes:
        """See Workers."""
        worker = self._asked.pop(handle)
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
    """Ray starts on 127.0.0.1 alone, whoever has imported it before."""
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
