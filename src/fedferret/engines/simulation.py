"""The engines whose clients are simulated in several processes: which transport a recipe's ``[execution]`` asks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from fedferret.engines.workers import Workers


class Settings(Protocol):
    """What of ``[execution]`` matters here."""

    @property
    def engine(self) -> str: ...
    @property
    def workers(self) -> int: ...
    @property
    def worker_cpus(self) -> float: ...
    @property
    def worker_gpus(self) -> float: ...
    @property
    def device(self) -> str: ...
    @property
    def memory(self) -> str: ...


def simulation(settings: Settings, folder: Path | None) -> Workers:
    """The workers that ``settings`` ask for, not yet started. Raises UserError where Ray is not installed."""
    threads = max(1, (os.cpu_count() or 1) // settings.workers)
    if settings.engine == "ray":
        from fedferret.engines.ray import RayWorkers

        return RayWorkers(
            settings.workers,
            site_toml(settings, threads),
            cpus=settings.worker_cpus,
            gpus=settings.worker_gpus,
        )
    from fedferret.engines.processes import Processes

    root = folder / "state" / "workers" if folder else None
    return Processes.simulating(settings.workers, site_toml(settings, threads), root)


def site_toml(settings: Settings, threads: int) -> str:
    """A worker's ``site.toml``: no data of its own, so it plays any client of the recipe's."""
    return f'name = "worker"\ndevice = "{settings.device}"\nmemory = "{settings.memory}"\nthreads = {threads}\n'
