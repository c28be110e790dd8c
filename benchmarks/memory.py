"""Peak memory of a Ferret round against that of one plain forward and backward pass, each in a separate process.

The plain pass loads the same model, computes the same loss on the same batch and keeps the gradients: the minimum for
first-order training of all weights without memory-saving techniques. The round is complete: local steps with gradient
clipping, projection, wire, server update, apply.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measure import Figure, alternate, main
from fedferret import recipe
from fedferret.data.examples import Example, FederatedData, Turn
from fedferret.experiment import Experiment
from fedferret.models import load

MODEL = "packaged:smollm2"
BATCH, TOKENS = 4, 128


def experiment(memory: str, method: str) -> Experiment:
    """Two clients with batches that all have the same shape.

    Args:
        memory: "lean" or "fast", of the recipe's ``execution.memory``.
        method: "ferret" (preset ``one-bit``) or another method.
    """
    preset = {"preset": "one-bit"} if method == "ferret" else {}
    settings = recipe(
        rounds=1,
        model={"name": MODEL},
        data={"source": "chitchat"},
        text={"max_tokens": TOKENS, "template": "alpaca"},
        clients={"per_round": 2},
        algorithm={"name": method, **preset, "training": {"steps": 2, "batch_size": BATCH}},
        execution={"memory": memory},
    )
    turns = (Turn("user", "count " * 200), Turn("assistant", " ".join(map(str, range(40)))))
    holdings = {name: (Example(turns),) * BATCH for name in ("left", "right")}
    return Experiment(settings, load(MODEL), FederatedData(holdings, {"held out": (Example(turns),)}, "synthetic"))


def child(kind: str) -> None:
    """Run one ``kind``, "plain" or "MEMORY-METHOD", and print this process's peak memory in bytes."""
    if kind == "plain":
        run = experiment("fast", "ferret")
        batch = next(run.examples["left"].batches(BATCH, None))
        run.loss(run.loaded.model, batch).backward()  # type: ignore[no-untyped-call]
    else:
        memory, method = kind.split("-")
        run = experiment(memory, method)
        state = run.initial_state()
        for record in run.run_rounds(state, run.engine(state)):
            assert not record.failures, record.failures
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(kind: str) -> float:
    """Peak memory in bytes of a process that runs ``kind``, as in ``child``."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def figures() -> Iterator[Figure]:
    """Ferret with lean and with fast memory against the plain pass."""
    note = f"SmolLM2-135M, batch {BATCH} x {TOKENS} tokens, fp32, gradients clipped, whole processes"
    for kind, target in (("lean-ferret", 1.1), ("fast-ferret", 1.6)):
        ratio = alternate(lambda kind=kind: peak(kind), lambda: peak("plain"), 3, 0)  # type: ignore[misc]
        yield Figure(f"a {kind.replace('-', ' ')} round against a plain pass", ratio, "at most", target, note, "B")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main("memory", "A lean round needs about the memory of one forward and backward pass.", figures)
