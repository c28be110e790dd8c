"""The engines that simulate clients in several processes: which transport a recipe's ``[execution]`` asks for."""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.files import write_atomically
from fedferret.engines.processes import Processes
from fedferret.engines.trainer import Trainer
from fedferret.engines.workers import Workers
from fedferret.resident.pins import FILE
from fedferret.resident.site import Site

if TYPE_CHECKING:
    from fedferret.config import ExecutionSettings

RESIDENT = (sys.executable, "-P", "-m", "fedferret.resident")  # the program of a worker or a site


def simulation(settings: ExecutionSettings, folder: Path | None) -> Workers:
    """The workers that a recipe asks for, not yet started.

    Args:
        settings: of ``[execution]``.
        folder: of the run; None: the workers' folders are temporary.

    Raises:
        UserError: Ray is not installed.
    """
    threads = max(1, (os.cpu_count() or 1) // settings.workers)
    # the worker names no data, so any client of the recipe works there
    text = Site(name="worker", device=settings.device, memory=settings.memory, threads=threads).to_toml()
    if settings.engine == "ray":
        from fedferret.engines.ray import RayWorkers

        make = partial(open_worker, text)
        return RayWorkers(settings.workers, make, cpus=settings.worker_cpus, gpus=settings.worker_gpus)
    root = folder / "state" / "workers" if folder else None
    return Processes.simulating(settings.workers, text, RESIDENT, root)


def open_worker(text: str) -> Trainer:
    """The trainer of a worker with this ``site.toml``; it keeps no folder."""
    from fedferret.resident.process import open_trainer

    with tempfile.TemporaryDirectory() as name:
        write_atomically(Path(name) / FILE, text)
        return open_trainer(Path(name))
