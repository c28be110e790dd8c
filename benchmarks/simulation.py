"""Thousands of clients with little data in one process: the cost of a client beyond training, in time and memory.

Every client has four short examples; the model has 90,624 random parameters. Overhead per client is the duration of a
round without the clients' training, divided by the number of clients. Memory is compared between a process with many
clients and one with few.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measure import Figure, alternate, main
from fedferret import recipe
from fedferret.core.rounds import RoundRecord
from fedferret.data.examples import Example, FederatedData, Turn
from fedferret.experiment import Experiment
from fedferret.models import load

MANY, FEW = 2000, 100
LIMIT = 0.005  # seconds of overhead per client


def run_rounds(clients: int, rounds: int = 1) -> list[RoundRecord]:
    """Run rounds in which every client takes one training step.

    Args:
        clients: number of clients, all of them in every round.
        rounds: number of rounds.
    """
    settings = recipe(
        rounds=rounds,
        model={"name": "tiny"},
        data={"source": "chitchat"},
        text={"max_tokens": 32},
        clients={"per_round": clients},
        algorithm={"name": "ferret", "preset": "one-bit", "training": {"steps": 1}},
    )
    turns = (Turn("user", "Two and two?"), Turn("assistant", "Four."))
    holdings = {f"client-{number:05d}": (Example(turns),) * 4 for number in range(clients)}
    data = FederatedData(holdings, {"held out": (Example(turns),)}, "synthetic")
    experiment = Experiment(settings, load("tiny"), data)
    state = experiment.initial_state()
    return list(experiment.run_rounds(state, experiment.engine(state)))


def overhead() -> float:
    """Overhead per client in a round of ``MANY`` clients, in seconds."""
    (record,) = run_rounds(MANY)
    return (record.seconds - record.seconds_local) / MANY


def peak(clients: int) -> float:
    """Peak memory in bytes of a process that runs one round of ``clients`` clients."""
    command = [sys.executable, "-m", "benchmarks.simulation", "--child", str(clients)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def figures() -> Iterator[Figure]:
    """Overhead per client against 5 ms; memory with many clients against memory with few."""
    note = f"{MANY:,} clients of four examples, one step each, Ferret with 4,096 one-bit coordinates, shared keys"
    yield Figure("overhead per client against 5 ms", alternate(overhead, lambda: LIMIT, 3, 0), "at most", 1.0, note)
    memory = alternate(lambda: peak(MANY), lambda: peak(FEW), 2, 0)
    claim = f"peak memory with {MANY:,} clients against {FEW}"
    yield Figure(claim, memory, "at most", 1.05, "one round in a separate process", "B")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_rounds(int(sys.argv[2]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    else:
        main("simulation", "Simulated clients cost little beyond their training.", figures)
