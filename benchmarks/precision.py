"""What weights in bf16 and bases in 4 bits cost in loss and save in memory, on SmolLM2-135M and real people's messages.

Every run has a process of its own: loss before and after each round, peak memory, seconds, bytes of the model. The bf16
runs of FedAvg also show what one client's update would be if it were taken from its rounded weights: its energy, and
the error of Ferret's reconstruction of it, which is proportional to the energy. At the end the tuned bf16 weights are
evaluated in fp32 too. The last figures are a calculation: a model of seven billion weights on a card of 12 GB.

    python -m benchmarks.precision            prints JSON; --save writes benchmarks/results/precision.json
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.measure import RESULTS
from fedferret import recipe
from fedferret.config import Recipe
from fedferret.core import tree
from fedferret.core.files import write_atomically
from fedferret.core.keys import Key
from fedferret.experiment import Experiment
from fedferret.export_dtype import widen
from fedferret.tracking.environment import environment

ROUNDS = 3
TRAINING = {"learning_rate": 0.03, "steps": 3, "batch_size": 2}
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
        data={"source": "chitchat", "min_messages": 50, "max_messages": 100, "max_held_out": 12},
        text={"max_tokens": 64},
        clients={"per_round": 2},
        algorithm=algorithm,
        evaluation={"local_only_clients": 0},
    )


def child(name: str) -> dict[str, Any]:
    """Carry out one run in this process."""
    experiment = Experiment.load(settings(name), log=lambda line: None)
    state = experiment.initial_state()
    held = experiment.model.state_dict().values()
    found: dict[str, Any] = {"model_bytes": sum(each.numel() * each.element_size() for each in held)}
    started, losses = time.perf_counter(), [loss(experiment, state.public)]
    for record in experiment.run_rounds(state, experiment.engine(state)):
        assert not record.failures, record.failures
        losses.append(loss(experiment, state.public))
    found |= {"losses": losses, "seconds": time.perf_counter() - started}
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if name == "FedAvg, bf16":
        found |= energies(experiment, state.public)
    if experiment.recipe.model.dtype == "bf16":
        with experiment.recipe.algorithm.model(experiment.task, state.public):
            widen(experiment.model)
            found["last_loss_in_fp32"] = figure(experiment)
    return found


def loss(experiment: Experiment, public: Any) -> float:
    """Of the global model on the held-out rows."""
    with experiment.recipe.algorithm.model(experiment.task, public):
        return figure(experiment)


def figure(experiment: Experiment) -> float:
    """Of the working model as it stands."""
    main = next(iter(experiment.data.held_out))
    return experiment.evaluator.figures(experiment.model, main)["loss"]


def energies(experiment: Experiment, public: Any) -> dict[str, float]:
    """A client's update as its optimiser's sum, and as the difference of rounded weights."""
    ferret: Any = settings("Ferret, bf16").algorithm
    client = next(iter(experiment.examples))
    with experiment.recipe.algorithm.model(experiment.task, public):
        training: Any = experiment.recipe.algorithm
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
        torch.set_num_threads(int(sys.argv[3]))
        print(json.dumps(child(sys.argv[2])))
        return
    threads, runs = torch.get_num_threads(), {}
    for name in RUNS:
        command = [sys.executable, "-m", "benchmarks.precision", "--child", name, str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, runs[name], file=sys.stderr, flush=True)
    result = {"runs": runs, "calculated_7b_on_12_gb": seven_billion(), "threads": threads, "machine": environment()}
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if "--save" in sys.argv:
        write_atomically(RESULTS / "precision.json", text.encode())


if __name__ == "__main__":
    main()
