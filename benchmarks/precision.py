"""What weights in bf16 and bases in 4 bits cost in loss and save in memory, on SmolLM2-135M and real people's messages.

Every run has a process of its own: seconds, bytes of the model, and the loss before and after each round, computed in
fp32 on the weights that the run holds (the last ones of a bf16 run in bf16 too). Another process has the peak memory of
one client's training. The bf16 run of FedAvg also shows what a client's update would be if it were taken from its
rounded weights: its energy, and the error of Ferret's reconstruction, which is proportional to the energy. The last
figures are a calculation: a model of seven billion weights on a card of 12 GB.

    python -m benchmarks.precision            prints JSON; --save writes benchmarks/results/precision.json
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import RESULTS
from fedferret import recipe
from fedferret.config import Recipe
from fedferret.core import tree
from fedferret.core.files import write_atomically
from fedferret.core.keys import Key
from fedferret.data.examples import Example, Turn
from fedferret.data.text import TextSettings
from fedferret.experiment import Experiment
from fedferret.export_dtype import widen
from fedferret.tracking.environment import environment

ROUNDS = 3
TRAINING = {"learning_rate": 0.03, "steps": 2, "batch_size": 2}
ADAPTER = {"name": "fedit", "training": {**TRAINING, "learning_rate": 1e-3}}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FedAvg, fp32": ({"name": "fedavg", "training": TRAINING}, {}),
    "FedAvg, bf16": ({"name": "fedavg", "training": TRAINING}, {"dtype": "bf16"}),
    "Ferret, fp32": ({"name": "ferret", "training": TRAINING}, {}),
    "Ferret, bf16": ({"name": "ferret", "training": TRAINING}, {"dtype": "bf16"}),
    "FedIT, fp32": (ADAPTER, {}),
    "FedIT, 4 bits": (ADAPTER, {"quantised": "4-bit"}),
    "FedIT, 8 bits": (ADAPTER, {"quantised": "8-bit"}),
}


def settings(name: str, seed: int = 1) -> Recipe:
    """The recipe of one run."""
    algorithm, model = RUNS[name]
    return recipe(
        seed=seed,
        rounds=ROUNDS,
        model={"name": "packaged:smollm2", **model},
        data={"source": "chitchat", "min_messages": 50, "max_messages": 100, "max_held_out": 8},
        text={"max_tokens": 48},
        clients={"per_round": 2},
        algorithm=algorithm,
        evaluation={"local_only_clients": 0},
    )


def child(name: str) -> dict[str, Any]:
    """Carry out one run in this process."""
    experiment = Experiment.load(settings(name), log=lambda line: None)
    state, started = experiment.initial_state(), time.perf_counter()
    held = experiment.model.state_dict().values()
    found: dict[str, Any] = {"model_bytes": sum(each.numel() * each.element_size() for each in held)}
    kept = [tree.clone(state.public.weights)]
    for record in experiment.run_rounds(state, experiment.engine(state)):
        assert not record.failures, record.failures
        kept.append(tree.clone(state.public.weights))
    found["seconds"] = time.perf_counter() - started
    if name == "FedAvg, bf16":
        found |= energies(experiment, state.public)
    if experiment.recipe.model.dtype == "bf16":
        found["last_loss_in_bf16"] = loss(experiment, kept[-1])
    if experiment.recipe.model.quantised is None:
        widen(experiment.model)
    return found | {"losses": [loss(experiment, weights) for weights in kept]}


def loss(experiment: Experiment, weights: Mapping[str, Tensor]) -> float:
    """On the held-out rows, in the precision of the working model."""
    tree.copy_(tree.parameters(experiment.model), weights)
    main = next(iter(experiment.data.held_out))
    return experiment.evaluator.figures(experiment.model, main)["loss"]


def peak(name: str) -> dict[str, float]:
    """Peak memory of one client's training in this process, one step of 4 rows of 128 tokens."""
    experiment = Experiment.load(replace(settings(name), text=TextSettings(max_tokens=128)), log=lambda line: None)
    state, training = experiment.initial_state(), experiment.recipe.algorithm
    turns = (Turn("user", "count " * 200), Turn("assistant", " ".join(map(str, range(40)))))
    rows = experiment.examples.encode((Example(turns),) * 4)
    changed: Any = replace(training, training=replace(training.training, batch_size=4, steps=1))  # type: ignore[call-arg, attr-defined]
    changed.client_update(experiment.task, state.public, None, rows, Key.of(1))
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def energies(experiment: Experiment, public: Any) -> dict[str, float]:
    """A client's update as its optimiser's sum, and as the difference of rounded weights."""
    ferret: Any = settings("Ferret, bf16").algorithm
    client = next(iter(experiment.examples))
    training: Any = experiment.recipe.algorithm
    with training.model(experiment.task, public):
        trained = training.training.train(experiment.task, experiment.examples[client], Key.of(1))
        rounded = tree.parameters(experiment.model)
    found: dict[str, float] = {}
    for kind, after in (("unrounded", trained.weights), ("rounded", rounded)):
        update = dict(tree.difference(public.weights, after))
        projector = ferret.projector(public)
        counts = projector.counts(projector.norms(update.items()))
        coordinates, _ = projector.project(update.items(), counts, Key.of(2))
        found[f"energy_{kind}"] = sum(float(delta.square().sum()) for delta in update.values())
        projector.reconstruct_(update, coordinates, counts, Key.of(2), -1.0)
        found[f"ferret_error_energy_{kind}"] = sum(float(delta.square().sum()) for delta in update.values())
    return found


def seven_billion() -> dict[str, float]:
    """Calculated, not measured: Llama 2 7B with LoRA of rank 8 on all linear layers, one row of 512 tokens; GB."""
    layers, width, inner, words, rank, tokens = 32, 4096, 11008, 32000, 8, 512
    linear = layers * (4 * width**2 + 3 * width * inner)
    factors = rank * layers * (4 * 2 * width + 3 * (width + inner))
    parts = {
        "linear layers, 4.127 bits a weight": linear * 4.127 / 8,
        "embedding, head and norms, bf16": 2 * (2 * words * width + (2 * layers + 1) * width),
        "LoRA: weights, public copy, gradient, two moments, fp32": 5 * 4 * factors,
        "activations between layers, recomputed, bf16": 2 * layers * tokens * width,
        "one layer's activations and its largest weight, bf16": 2 * (tokens * (12 * width + 4 * inner) + width * inner),
        "logits and their gradient, fp32": 2 * 4 * tokens * words,
        "CUDA's context, a usual figure": 0.5e9,
    }
    return {**{name: round(size / 1e9, 3) for name, size in parts.items()}, "sum": round(sum(parts.values()) / 1e9, 2)}


def main() -> None:
    """All runs, one after the other, or those whose names were given."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[3]) if sys.argv[2] == "run" else peak(sys.argv[3])))
        return
    threads, runs = torch.get_num_threads(), dict[str, Any]()
    for name in RUNS:
        runs[name] = {}
        for what in ("run", "peak"):
            command = [sys.executable, "-m", "benchmarks.precision", "--child", what, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name] |= json.loads(done.stdout.splitlines()[-1])
        print(name, runs[name], file=sys.stderr, flush=True)
    result = {"runs": runs, "calculated_7b_on_12_gb": seven_billion(), "threads": threads, "machine": environment()}
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if "--save" in sys.argv:
        write_atomically(RESULTS / "precision.json", text.encode())


if __name__ == "__main__":
    main()
