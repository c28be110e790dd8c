"""Thousands of clients with tiny data in one process: what each costs beyond its training, in time and in memory.

Every client holds four short examples; the model is the random one of 90,624 parameters. Overhead is what a round
lasts beyond its clients' training passes, per client. Memory is compared between processes with many and few clients.
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


def play(clients: int, rounds: int = 1) -> list[RoundRecord]:
    """Rounds in which every one of ``clients`` clients takes a training step."""
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
    return list(experiment.play(state, experiment.engine(state)))


def overhead() -> float:
    """Seconds beyond training, per client, in a round of many."""
    (record,) = play(MANY)
    return (record.seconds - record.seconds_local) / MANY


def peak(clients: int) -> float:
    """Peak memory, in bytes, of a process that plays a round of so many clients."""
    command = [sys.executable, "-m", "benchmarks.simulation", "--child", str(clients)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def figures() -> Iterator[Figure]:
    """Time per client against 5 ms; memory of many against memory of few."""
    note = f"{MANY:,} clients of four examples, one step each, Ferret with 4,096 one-bit coordinates, shared keys"
    yield Figure("overhead a client against 5 ms", alternate(overhead, lambda: LIMIT, 3, 0), "at most", 1.0, note)
    memory = alternate(lambda: peak(MANY), lambda: peak(FEW), 2, 0)
    claim = f"peak memory with {MANY:,} clients against {FEW}"
    yield Figure(claim, memory, "at most", 1.05, "one round in a process of its own", "B")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        play(int(sys.argv[2]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    else:
        main("simulation", "Simulated clients cost nothing but their training.", figures)
