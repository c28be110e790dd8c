"""A round of each tuner against a round of what it stands on: FedIT for adapters, FedAvg for full-parameter stages.

The model is MiniLM on BBC News, two clients of ten steps of 16 texts of 32 tokens. Compared are the seconds of the
clients' training in a round in which nothing is scored; what a method scores beside (examples, layers, spectra) is its
own work, and stands in the note with the peak memory of a process that has the model, the data and the run.

    python -m benchmarks.tuner_rounds [--save]
    python -m benchmarks.tuner_rounds NAME ROUNDS    the figures of one run, as JSON
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.measure import Figure, alternate, main
from benchmarks.tuners import CONTENDERS, settings
from fedferret.experiment import Experiment

LIMIT, RATE, REPETITIONS = 1.1, 1e-3, 2


@dataclass(frozen=True)
class Compared:
    """A kind of round.

    Attributes:
        name: of the contender.
        round: which is compared, from 1; those before it are of another stage, or score.
        to: the contender that is the measure.
        to_round: which of its rounds; a first round is compared with a first, since it pays what is paid once.
    """

    name: str
    round: int = 2
    to: str = "fedit"
    to_round: int = 2


COMPARED = (
    Compared("ferret", to="fedavg"),
    Compared("slora", 2, to="fedavg"),
    Compared("slora", 4),
    Compared("sa-fedlora", 1, to="fedavg", to_round=1),
    Compared("sa-fedlora", 3),
    Compared("ssf"),
    Compared("fibecfed", 3),
    Compared("fedpeptao", 3),
    Compared("ferret-over-fedit"),
    Compared("ffa-lora"),
    Compared("fedsa-lora"),
    Compared("fedex-lora"),
)


def figures_of(name: str, rounds: int) -> dict[str, Any]:
    """Carry out the first rounds of a run in this process.

    Args:
        name: of the contender.
        rounds: how many.

    Returns:
        By round the seconds in all and those of training; the peak memory of the process, in bytes.
    """
    made = settings(CONTENDERS[name], "bbc-news", 0.1, 20, 1, RATE)
    made = replace(made, clients=replace(made.clients, per_round=2, min_clients=1))
    experiment = Experiment.load(made, log=lambda line: None)
    state = experiment.initial_state()
    seconds, local = [], []
    for record in experiment.run_rounds(state, experiment.engine(state)):
        assert not record.failures, record.failures
        seconds.append(record.seconds)
        local.append(record.seconds_local)
        if len(seconds) == rounds:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "training": local, "peak_bytes": peak}


def figures() -> Iterator[Figure]:
    """Seconds of training in one round, method against measure."""
    for each in COMPARED:
        seen: list[dict[str, Any]] = []

        def training(name: str, round: int, seen: list[dict[str, Any]]) -> Callable[[], float]:
            def measured() -> float:
                command = [sys.executable, "-m", "benchmarks.tuner_rounds", name, str(round)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                seen.append({"name": name, **found})
                return float(found["training"][round - 1])

            return measured

        ratio = alternate(training(each.name, each.round, seen), training(each.to, each.to_round, seen), REPETITIONS, 0)
        own, other = (next(one for one in seen if one["name"] == name) for name in (each.name, each.to))
        beside = [round(all_ - local, 2) for all_, local in zip(own["seconds"], own["training"], strict=True)]
        note = (
            f"round {each.round} against round {each.to_round}; seconds beside training by round: {beside} "
            f"(of {each.to}: {round(other['seconds'][-1] - other['training'][-1], 2)}); peak memory "
            f"{own['peak_bytes'] / 1e6:,.0f} MB ({each.to}: {other['peak_bytes'] / 1e6:,.0f} MB)"
        )
        yield Figure(f"a round of {each.name} against one of {each.to}", ratio, "at most", LIMIT, note)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(figures_of(sys.argv[1], int(sys.argv[2]))))
    else:
        main("tuner_rounds", "A round of a tuner takes as long as one of FedIT or FedAvg.", figures)
