"""Where FedPTR's projections point, beside the last global step and the gradient over all clients.

Rounds of FedAvg give the iterates w^0, w^1, ... A set is matched to each step in turn, warm-started, and projects from
the step's end. Every direction is compared with the descent of the mean loss over all clients' examples at that end,
which no node of a run knows, and with the step that FedAvg takes next.

    python -m benchmarks.projected_trajectory          digits, Dirichlet 0.1, 20 clients, lenet5; a minute of one core
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from fedferret.config import from_tables
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.experiment import Experiment
from fedferret.local.trajectory_matching import first_set, matched, projected
from fedferret.recipe_file import read_tables

ROUNDS = 8
SETS = ((1, 1), (3, 1), (1, 3))  # S = S', examples per class


def cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Between two directions, by name."""
    first, second = (torch.cat([each[name].flatten() for name in left]) for each in (left, right))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


def descent(experiment: Experiment, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Minus the gradient of the summed loss over all clients' examples."""
    model, tuned = experiment.task.model, dict(experiment.task.model.named_parameters())
    tree.copy_(tree.parameters(model), weights)
    total = tree.zeros_like(weights)
    for client in experiment.examples:
        for batch in experiment.examples[client].batches(512, None):
            loss = experiment.task.objective.loss(model, batch) * len(batch)
            for name, gradient in zip(tuned, torch.autograd.grad(loss, list(tuned.values())), strict=True):
                total[name] -= gradient
    return total


def main() -> None:
    """Print a line per direction: mean cosines over the rounds, and the mean L."""
    tables = read_tables("recipes/small/fedptr.toml")
    training = tables["algorithm"]["training"]
    tables.update(rounds=ROUNDS, algorithm={"name": "fedavg", "training": training})
    experiment = Experiment.load(from_tables(tables), log=lambda line: None)
    state = experiment.initial_state()
    iterates = [tree.clone(state.public.weights)]
    for _ in experiment.run_rounds(state, experiment.engine(state)):
        iterates.append(tree.clone(state.public.weights))
    steps = [{name: -delta for name, delta in tree.difference(before, after)} for before, after in pairwise(iterates)]
    best = [descent(experiment, weights) for weights in iterates[1:]]

    def line(name: str, directions: list[dict[str, Tensor]], mismatch: float = float("nan")) -> None:
        to_best, to_next = map(cosine, directions, best), map(cosine, directions, steps[1:])
        print(f"{name:28} descent {fmean(to_best):.3f}   next step {fmean(to_next):.3f}   L {mismatch:.3f}", flush=True)

    line("the last step", steps)
    model, shape = experiment.task.model, experiment.task.model.input_shape(0)  # type: ignore[operator]
    for inner, per_class in SETS:
        found = first_set(shape, 1.0, 10, per_class, training["learning_rate"], Key.of(1), torch.device("cpu"))
        directions, mismatches = [], []
        for before, after in pairwise(iterates):
            found, mismatch = matched(model, before, after, found, steps=20, inner_steps=inner, rate=0.1)
            mismatches.append(mismatch)
            ahead = projected(model, after, found, inner)
            directions.append({name: ahead[name] - after[name] for name in ahead})
        line(f"S = {inner}, {per_class} per class", directions, fmean(mismatches))


if __name__ == "__main__":
    main()
