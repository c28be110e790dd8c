"""A hundred private models: the store has one in memory, the others on disk, and a round of ten is mostly training.

MNIST (5,000) is partitioned among 100 clients, two classes each, and each keeps the body of its model to itself; the
head alone travels. A round is what the event log says of it, with events, checkpoint and the ten private states that it
reads and writes; scoring is left out. Memory is compared between a process with 100 private models and one with ten.

    lenet5   243 KB a client, eight local steps of 32 images, which are five epochs or more
    conv4    7.7 MB a client, two local steps

    python -m benchmarks.private_models [--save]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from benchmarks.measure import Figure, Ratio, main
from fedferret import recipe
from fedferret.algorithms.partly_private import PartlyPrivate
from fedferret.config import Recipe
from fedferret.disk import kept_states, wire_costs
from fedferret.experiment import Experiment
from fedferret.local.first_order import FirstOrder
from fedferret.models.classifiers import HEAD
from fedferret.runner import Run
from fedferret.tracking import events

CLIENTS, FEW, COHORT, HISTORY = 100, 10, 10, 2
LIMIT, LIMIT_OF_MEMORY = 0.2, 1.1  # beside training; with 100 private models against ten
ROUNDS, STEPS = {"lenet5": 12, "conv4": 8}, {"lenet5": 8, "conv4": 2}


@dataclass(frozen=True, kw_only=True)
class PrivateBody(PartlyPrivate):
    """The head is averaged, the body stays at its client."""

    name: ClassVar[str] = "private-body"
    has_global_model: ClassVar[bool] = False

    def shares(self, names: Iterable[str]) -> list[str]:
        """The head's weights."""
        return [name for name in names if name.startswith(HEAD)]


def settings(model: str, clients: int) -> Recipe:
    """The recipe of a run in which every client has a model.

    Args:
        model: a key of ``STEPS``.
        clients: among whom the images are divided.
    """
    made = recipe(
        rounds=ROUNDS[model],
        model={"name": model},
        data={"source": "mnist", "partition": {"kind": "pathological", "clients": clients, "min_examples": 2}},
        clients={"per_round": COHORT},
        algorithm={"name": "fedavg"},
        evaluation={"every": ROUNDS[model], "local_only_clients": 0, "per_client": False, "batch_size": 64},
        execution={"history": HISTORY},
    )
    training = FirstOrder(learning_rate=0.1, batch_size=32, steps=STEPS[model])
    return replace(made, algorithm=PrivateBody(training=training))


def carried_out(model: str, clients: int) -> dict[str, Any]:
    """One run in this process.

    Args:
        model: as in ``settings``.
        clients: as in ``settings``.

    Returns:
        By round the seconds beside training and those of training; bytes of private states on disk, how many there are,
        and the most that was stated before the run; the peak memory of the process, in bytes.
    """
    asked = settings(model, clients)
    cost = wire_costs(asked)(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.toml").write_text(asked.to_toml())
        Run(Experiment.load(asked, folder, lambda line: None), folder, lambda line: None).finish()
        files = [path.stat().st_size for path in folder.glob("state/clients/*.state")]
        rounds = [entry for number, entry in sorted(events.read(folder).rounds.items()) if number > 1]
    assert not [failure for entry in rounds for failure in entry.failures]
    return {
        "beside": [entry.seconds_overhead for entry in rounds],
        "training": [entry.seconds_local for entry in rounds],
        "states": len(files),
        "bytes": sum(files),
        "stated": cost.client_state_bytes * kept_states(clients, ROUNDS[model], COHORT, HISTORY),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def in_a_process(model: str, clients: int) -> dict[str, Any]:
    """``carried_out`` in a process that has done nothing before."""
    command = [sys.executable, "-m", "benchmarks.private_models", "--child", model, str(clients)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def figures() -> Iterator[Figure]:
    """Seconds beside training against those of training, disk against what was stated, memory against ten's."""
    for model in STEPS:
        many, few = in_a_process(model, CLIENTS), in_a_process(model, FEW)
        each = f"{model}, {many['bytes'] / many['states'] / 1e6:.3g} MB a client"
        note = (
            f"{COHORT} of {CLIENTS} clients a round, rounds 2 to {ROUNDS[model]}, {STEPS[model]} local steps on MNIST"
        )
        ratio = Ratio(tuple(many["beside"]), tuple(many["training"]))
        yield Figure(f"a round beside training against training, {each}", ratio, "at most", LIMIT, note)
        note = f"{many['states']} private states of {HISTORY} past rounds and the last, {many['bytes'] / 1e6:,.0f} MB"
        ratio = Ratio((many["bytes"],), (many["stated"],))
        yield Figure(f"disk against what is stated before the run, {each}", ratio, "at most", 1.01, note, "B")
        ratio = Ratio((many["peak"],), (few["peak"],))
        claim = f"peak memory with {CLIENTS} private models against {FEW}, {each}"
        yield Figure(claim, ratio, "at most", LIMIT_OF_MEMORY, "the same images, whole processes", "B")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(carried_out(sys.argv[2], int(sys.argv[3]))))
    else:
        main("private_models", "Private models lie on disk, and cost a round little.", figures)
