"""A training step on a busy machine: threads that sleep soon against threads as OpenMP has them wait.

The command lets waiting threads sleep soon (``core/waiting.py``). A process takes steps for some seconds with as many
threads as there are cores, on an idle machine and beside one endless loop for every second core.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.measure import Figure, Measurement, alternate, main
from fedferret.core.waiting import sleep_soon

CORES = os.cpu_count() or 1
STEPS = """
import time, torch
from fedferret import models
torch.set_num_threads({threads})
model = models.load("{model}").model
row = torch.arange({batch} * 100).view({batch}, 100) % 2000 + 3
def step():
    model(input_ids=row, labels=row).loss.backward()
step()
began, steps = time.perf_counter(), 0
while time.perf_counter() - began < {seconds}:
    step()
    steps += 1
print((time.perf_counter() - began) / steps)
"""


def step(model: str, batch: int, soon: bool) -> Measurement:
    """A measurement of a step's seconds in a new process.

    Args:
        model: as in a recipe.
        batch: rows of 100 tokens.
        soon: whether waiting threads sleep soon.
    """
    program = STEPS.format(threads=CORES, model=model, batch=batch, seconds=6)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    if soon:
        sleep_soon(environment)

    def measured() -> float:
        command = [sys.executable, "-c", program]
        return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)

    return measured


@contextmanager
def busy() -> Iterator[None]:
    """Other work on half of the cores, each in a new session: schedulers share the machine among sessions."""
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        for _ in range(max(1, CORES // 2))
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def figures() -> Iterator[Figure]:
    """A small model and SmolLM2, idle and busy."""
    for name, model, batch in (("3 M weights", "recipes/small/chat-3m", 2), ("SmolLM2-135M", "packaged:smollm2", 4)):
        soon, usual, note = step(model, batch, True), step(model, batch, False), f"{batch} rows of 100 tokens"
        idle = alternate(soon, usual, 3, 0)
        yield Figure(f"a step of {name} on an idle machine, sleeping soon against as usual", idle, "at most", 1.2, note)
        with busy():
            loaded = alternate(soon, usual, 3, 0)
        yield Figure(
            f"a step of {name} on a busy machine, sleeping soon against as usual", loaded, "at most", 0.5, note
        )


if __name__ == "__main__":
    main("busy_machine", "A busy machine costs a run its share and no more.", figures)
