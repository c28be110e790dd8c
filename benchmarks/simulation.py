"""Thousands of clients with little data in one process: the cost of a client beyond training, in time and memory.

Every client has four short examples; the model has 90,624 random parameters. Overhead per client is the duration of a
round without the clients' training, divided by the number of clients. With a folder the round includes its events, its
checkpoint and the clients' private states on disk. Memory is compared between a process with many clients and one with
few.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import Figure, alternate, main
from fedferret import recipe
from fedferret.core.rounds import RoundRecord
from fedferret.data.examples import Example, FederatedData, Turn
from fedferret.experiment import Experiment
from fedferret.models import load
from fedferret.runner import Run
from fedferret.tracking import events

MANY, FEW = 2000, 100
LIMIT = 0.005  # seconds of overhead per client


SHARED = {"name": "ferret", "preset": "one-bit"}
STATEFUL = {**SHARED, "error_feedback": True, "scale": "shrunk"}  # each client keeps a residual of the model's size


def experiment(clients: int, rounds: int, method: Mapping[str, Any], folder: Path | None) -> Experiment:
    """A run in which every client takes one training step per round.

    Args:
        clients: number of clients, all of them in every round.
        rounds: number of rounds.
        method: name and settings.
        folder: of the run; None keeps nothing on disk.
    """
    settings = recipe(
        rounds=rounds,
        model={"name": "tiny"},
        data={"source": "chitchat"},
        text={"max_tokens": 32},
        clients={"per_round": clients},
        algorithm={**method, "training": {"steps": 1}},
        evaluation={"every": rounds, "local_only_clients": 0},
    )
    turns = (Turn("user", "Two and two?"), Turn("assistant", "Four."))
    holdings = {f"client-{number:05d}": (Example(turns),) * 4 for number in range(clients)}
    data = FederatedData(holdings, {"held out": (Example(turns),)}, "synthetic")
    return Experiment(settings, load("tiny"), data, folder)


def run_rounds(clients: int, rounds: int = 1) -> list[RoundRecord]:
    """Run rounds that keep nothing on disk.

    Args:
        clients: number of clients, all of them in every round.
        rounds: number of rounds.
    """
    run = experiment(clients, rounds, SHARED, None)
    state = run.initial_state()
    return list(run.run_rounds(state, run.engine(state)))


def overhead() -> float:
    """Overhead per client in a round of ``MANY`` clients that keeps nothing on disk, in seconds."""
    (record,) = run_rounds(MANY)
    return (record.seconds - record.seconds_local) / MANY


def overhead_with_folder(method: Mapping[str, Any]) -> float:
    """Overhead per client in the second round of a run in a folder, all that is written included, in seconds.

    Args:
        method: name and settings.
    """
    with TemporaryDirectory() as name:
        made = experiment(MANY, 2, method, Path(name))
        (Path(name) / "recipe.toml").write_text(made.recipe.to_toml())
        Run(made, Path(name), lambda line: None).finish()
        entry = events.read(Path(name)).rounds[2]
    return entry.seconds_overhead / MANY


def peak(clients: int) -> float:
    """Peak memory in bytes of a process that runs one round of ``clients`` clients."""
    command = [sys.executable, "-m", "benchmarks.simulation", "--child", str(clients)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def figures() -> Iterator[Figure]:
    """Overhead per client against 5 ms; memory with many clients against memory with few."""
    note = f"{MANY:,} clients of four examples, one step each, Ferret with 4,096 one-bit coordinates, shared keys"
    yield Figure("overhead per client against 5 ms", alternate(overhead, lambda: LIMIT, 3, 0), "at most", 1.0, note)
    for method, kept in ((SHARED, "no private state"), (STATEFUL, "a residual of 362 KB kept per client")):
        pairs = alternate(partial(overhead_with_folder, method), lambda: LIMIT, 3, 0)
        claim = f"overhead per client with a folder, {kept}, against 5 ms"
        yield Figure(claim, pairs, "at most", 1.0, f"{note}; second round, with events, checkpoint and states")
    memory = alternate(lambda: peak(MANY), lambda: peak(FEW), 2, 0)
    claim = f"peak memory with {MANY:,} clients against {FEW}"
    yield Figure(claim, memory, "at most", 1.05, "one round in a separate process", "B")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_rounds(int(sys.argv[2]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    else:
        main("simulation", "Simulated clients cost little beyond their training.", figures)
