"""The reconstruction noise that Ferret adds to the weights: its norm and the loss, round by round.

After round t the weights differ from the exact weights w_0 - η Σ Δ_s, which the clients' updates would have given
without projection, by the reconstruction noise of all rounds so far,

    noise_t = w_0 - w_t - η Σ_{s <= t} Δ_s,        Δ_s the weighted mean update of round s's clients, before projection

The noise of each round is drawn anew, so this is a random walk: the norm grows like √t until the noise affects the
loss. The benchmark also measures the norm of the exact sum Σ Δ_s, and the norm that the formula predicts,
√Σ_s Σ_l (d_l/K_l - 1) ‖Δ_s,l‖² for buckets.

    python -m benchmarks.noise recipes/small/reasoning.toml --set algorithm.coordinates=512

prints a JSON object and writes no file. The recipe's method must be Ferret with shared keys. With ``--by-kind``, the
object also has the final noise by kind of tensor, and its cost: the rise of the loss when the noise of one kind alone
is added to the exact weights, with either sign. A kind is the tensors of one name in all layers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedferret.algorithms.ferret import Ferret
from fedferret.algorithms.ferret_messages import FerretPublic
from fedferret.bases.blocks import decode_norms
from fedferret.config import Recipe, from_tables
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.rounds import RunState
from fedferret.experiment import Experiment
from fedferret.recipe_file import read_tables
from fedferret.tracking.environment import environment


@dataclass
class Walk:
    """Sums over the rounds so far."""

    true: tree.Tree  # Σ Δ_s of finished rounds
    now: tree.Tree  # Σ n_j Δ_j of the current round
    weight: float = 0.0  # Σ n_j of the current round
    predicted: float = 0.0  # energy of the noise


@dataclass(frozen=True, kw_only=True)
class Watched(Ferret):
    """Ferret that also sums the clients' exact updates while they are projected. The results are those of Ferret."""

    walk: Walk = field(compare=False, repr=False)

    def client_update(self, task: Any, public: Any, client: Any, data: Any, key: Any) -> Any:
        """As in Ferret; then the update is added with the weight of the reply.

        Args:
            task: as in ``Ferret.client_update``.
            public: likewise.
            client: likewise.
            data: likewise.
            key: likewise.
        """
        seen: tree.Tree = {}
        object.__setattr__(self, "_seen", seen)
        reply = super().client_update(task, public, client, data, key)
        for name, delta in seen.items():
            self.walk.now[name].add_(delta, alpha=reply.weight)
        self.walk.weight += reply.weight
        return reply

    def _change(self, public: FerretPublic, client: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, delta in super()._change(public, client, model):
            self._seen.setdefault(name, delta.clone())  # type: ignore[attr-defined]
            yield name, delta


def watch(recipe: Recipe, by_kind: bool = False) -> dict[str, Any]:
    """Run the recipe: loss and norms at every evaluation, and the cost of the final noise by kind of tensor.

    Args:
        recipe: of Ferret with shared keys.
        by_kind: whether to measure the cost.
    Raises:
        UserError: for another method or other keys.
    """
    if not isinstance(recipe.algorithm, Ferret) or recipe.algorithm.keys != "shared":
        raise UserError('this benchmark needs a recipe with algorithm.name = "ferret" and algorithm.keys = "shared"')
    experiment = Experiment.load(recipe, log=lambda text: print(text, file=sys.stderr))
    start = tree.clone(tree.parameters(experiment.model))
    walk = Walk(tree.zeros_like(start), tree.zeros_like(start))
    settings = {item.name: getattr(recipe.algorithm, item.name) for item in fields(recipe.algorithm)}
    experiment.recipe = replace(recipe, algorithm=Watched(**settings, walk=walk))
    state = experiment.initial_state()
    engine = experiment.engine(state)
    main = next(iter(experiment.data.held_out))
    points = [_point(experiment, state, engine, walk, start, main)]
    counts = _counts(experiment.recipe.algorithm, state.public)
    for record in experiment.run_rounds(state, engine):
        _close(experiment.recipe.algorithm, walk, counts, state.public)
        counts = _counts(experiment.recipe.algorithm, state.public)
        if record.round % recipe.evaluation.every == 0 or record.round == recipe.rounds:
            points.append(_point(experiment, state, engine, walk, start, main))
            print(points[-1], file=sys.stderr, flush=True)
    result = {"method": recipe.tables()["algorithm"], "model": recipe.model.name, "seed": recipe.seed, "points": points}
    return {**result, **(_kinds(experiment, state, walk, start, main) if by_kind else {})}


def _counts(algorithm: Any, public: FerretPublic) -> tuple[int, ...]:
    """K_l of the next round."""
    counts: tuple[int, ...] = algorithm.projector(public).counts(decode_norms(public.norms))
    return counts


def _close(algorithm: Any, walk: Walk, counts: tuple[int, ...], public: FerretPublic) -> None:
    """Add the mean update of the finished round to the sums."""
    for name, delta in walk.now.items():
        delta.div_(walk.weight)
        walk.true[name].add_(delta)
    projector = algorithm.projector(public)
    norms = projector.norms(iter(walk.now.items()))
    for block, count, norm in zip(projector.blocks, counts, norms, strict=True):
        walk.predicted += (block.size / count - 1) * norm**2
    for delta in walk.now.values():
        delta.zero_()
    walk.weight = 0.0


def _noise(state: RunState, walk: Walk, start: tree.Tree) -> Iterator[tuple[str, Tensor]]:
    """The exact weights minus the weights, one tensor at a time."""
    for name, weight in state.public.weights.items():
        yield name, start[name] - weight - walk.true[name]


def _point(
    experiment: Experiment, state: RunState, engine: Any, walk: Walk, start: tree.Tree, main: str
) -> dict[str, float]:
    """Loss and norms after the last finished round."""
    noise, moved = 0.0, 0.0
    for name, difference in _noise(state, walk, start):
        noise += float(difference.double().pow(2).sum())
        moved += float(walk.true[name].double().pow(2).sum())
    loss = experiment.score(state, engine).results[main]["loss"]
    return {
        "round": state.round,
        "loss": loss,
        "noise": math.sqrt(noise),
        "true_walk": math.sqrt(moved),
        "predicted_noise": math.sqrt(walk.predicted),
        "weights": math.sqrt(sum(float(weight.double().pow(2).sum()) for weight in start.values())),
    }


def _kinds(experiment: Experiment, state: RunState, walk: Walk, start: tree.Tree, main: str) -> dict[str, Any]:
    """The rise of the loss when the noise of one kind of tensor alone is added to the exact weights."""
    weights = state.public.weights
    noise = dict(_noise(state, walk, start))

    def loss() -> float:
        with experiment.recipe.algorithm.model(experiment.task, state.public) as model:
            return experiment.evaluator.figures(model, main)["loss"]

    def shift(names: Iterable[str], sign: float) -> None:
        for name in names:
            weights[name].add_(noise[name], alpha=sign)

    kinds: dict[str, list[str]] = {}
    for name in weights:
        kinds.setdefault(kind_of(name), []).append(name)
    shift(weights, 1)
    true = loss()
    rows = []
    for kind, names in kinds.items():
        shift(names, -1)
        there = loss()
        shift(names, 2)
        back = loss()
        shift(names, -1)
        norm = math.sqrt(sum(float(noise[name].double().pow(2).sum()) for name in names))
        size = sum(noise[name].numel() for name in names)
        # the mean of both signs: the first-order terms of the loss cancel
        rows.append({"kind": kind, "weights": size, "noise": norm, "rise": (there + back) / 2 - true})
        print(rows[-1], file=sys.stderr, flush=True)
    return {"loss_of_the_true_path": true, "kinds": rows}


def kind_of(name: str) -> str:
    """A parameter's name without its layer: ``model.layers.3.mlp.up_proj.weight`` is of the kind ``mlp.up_proj``."""
    return re.sub(r"^.*\.\d+\.|^model\.|\.weight$", "", name)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="NAME=VALUE")
    parser.add_argument(
        "--by-kind", action="store_true", help="also measure the noise by kind of tensor, and what it costs"
    )
    arguments = parser.parse_args()
    result = watch(from_tables(read_tables(arguments.recipe, arguments.overrides)), arguments.by_kind)
    print(json.dumps({**result, "machine": environment()}, indent=1))


if __name__ == "__main__":
    main()
