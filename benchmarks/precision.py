"""What weights in bf16 and bases in 4 and 8 bits cost in loss and save in memory.

losses     of the trained model of 3.2 million weights, before and after each round, computed in fp32 on the weights
           that the run holds; the last ones of a bf16 run in bf16 too. ``--model packaged:smollm2`` takes SmolLM2,
           which needs an idle machine: a processor without bf16 arithmetic is ten times slower in bf16
memory     of one local step of SmolLM2-135M on 4 rows of 128 tokens: the peak of a whole process
energy     of that step's update, as the optimiser's sum and as the difference of rounded weights; and the error of
           Ferret's reconstruction of both, which is proportional to the energy
7B         calculated, not measured: a model of seven billion weights on a card of 12 GB

python -m benchmarks.precision [--model NAME]        prints JSON; --save writes benchmarks/results/precision.json
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

from torch import Tensor

from benchmarks.measure import RESULTS
from fedferret import recipe
from fedferret.config import Recipe
from fedferret.core import tree
from fedferret.core.files import write_atomically
from fedferret.core.keys import Key
from fedferret.data.examples import Example, Turn
from fedferret.experiment import Experiment
from fedferret.export_dtype import widen
from fedferret.tracking.environment import environment

ROUNDS = 4
TASKS = ["chain_sum", "spell_backward", "gcd", "leg_counting"]
TRAINING = {"learning_rate": 0.1, "steps": 4, "batch_size": 4}
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


def settings(name: str, model: str, max_tokens: int = 64) -> Recipe:
    """The recipe of one run."""
    algorithm, held = RUNS[name]
    return recipe(
        rounds=ROUNDS,
        model={"name": model, **held},
        data={"source": "reasoning-gym", "tasks": TASKS, "rows": 32, "held_out_rows": 12, "held_out_tasks": 0},
        text={"max_tokens": max_tokens},
        clients={"per_round": 2},
        algorithm=algorithm,
        evaluation={"local_only_clients": 0},
    )


def losses(name: str, model: str) -> dict[str, Any]:
    """Carry out one run in this process."""
    experiment = Experiment.load(settings(name, model), log=lambda line: None)
    state, started = experiment.initial_state(), time.perf_counter()
    kept = [tree.clone(state.public.weights)]
    for record in experiment.run_rounds(state, experiment.engine(state)):
        assert not record.failures, record.failures
        kept.append(tree.clone(state.public.weights))
    found: dict[str, Any] = {"seconds": time.perf_counter() - started}
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


def memory(name: str) -> dict[str, Any]:
    """One local step of SmolLM2 in this process."""
    experiment = Experiment.load(settings(name, "packaged:smollm2", 128), log=lambda line: None)
    state, method = experiment.initial_state(), experiment.recipe.algorithm
    held = experiment.model.state_dict().values()
    turns = (Turn("user", "count " * 200), Turn("assistant", " ".join(map(str, range(40)))))
    rows, public = experiment.examples.encode((Example(turns),) * 4), state.public
    training: Any = method
    with method.model(experiment.task, public):
        step = replace(training.training, batch_size=4, steps=1)
        started = time.perf_counter()
        trained = step.train(experiment.task, rows, Key.of(1))
    found: dict[str, Any] = {
        "model_bytes": sum({each.data_ptr(): each.numel() * each.element_size() for each in held}.values()),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds_of_a_step": time.perf_counter() - started,
    }
    if experiment.recipe.model.dtype == "fp32":
        return found
    ferret: Any = settings("Ferret, bf16", "packaged:smollm2").algorithm
    projector = ferret.projector(public)
    for kind, after in (("unrounded", trained.weights), ("rounded", tree.parameters(experiment.model))):
        update = dict(tree.difference(public.weights, after))
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


def measured(what: str, name: str, *options: str) -> dict[str, Any]:
    """The result of a process that measures one thing."""
    command = [sys.executable, "-m", "benchmarks.precision", "--child", what, name, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(what, name, found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    """All of it, one process after the other."""
    if sys.argv[1:2] == ["--child"]:
        what, *words = sys.argv[2:]
        print(json.dumps(losses(*words) if what == "losses" else memory(*words)))
        return
    model = sys.argv[sys.argv.index("--model") + 1] if "--model" in sys.argv else "recipes/small/chat-3m"
    result = {
        "model": model,
        "losses": {name: measured("losses", name, model) for name in RUNS},
        "memory": {name: measured("memory", name) for name in RUNS if not name.startswith("Ferret")},
        "calculated_7b_on_12_gb": seven_billion(),
        "machine": environment(),
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if "--save" in sys.argv:
        write_atomically(RESULTS / "precision.json", text.encode())


if __name__ == "__main__":
    main()
