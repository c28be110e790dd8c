"""The random walk that Ferret adds to the weights: its norm beside the loss, round by round.

After round t the weights differ from where the clients' true changes would have led by the reconstruction noise of all
rounds so far,

    noise_t = w_0 - w_t - η Σ_{s <= t} Δ_s,        Δ_s the weighted mean change of round s's clients, before projection

and since each round's noise is drawn anew, its norm grows like √t until the loss feels it. Measured beside it: the norm
of the true walk Σ Δ_s, and the norm that the formula predicts, √Σ_s Σ_l (d_l/K_l - 1) ‖Δ_s,l‖² for buckets.

    python -m benchmarks.noise recipes/small/reasoning.toml --set algorithm.coordinates=512

prints a JSON object. The recipe's method must be Ferret with shared keys. Nothing is written. With ``--by-kind``, it
also says of the noise at the end in which tensors it is, and what it costs there: how much the loss rises with one
kind's noise alone, put on the true path with either sign. A kind: the tensors of one name in all layers.
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

from fedferret.algorithms.ferret import Ferret, FerretPublic
from fedferret.bases.blocks import decode_norms
from fedferret.config import Recipe, from_tables
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.rounds import RunState
from fedferret.evaluation.loss import evaluate
from fedferret.experiment import Experiment
from fedferret.recipe_file import read_tables
from fedferret.tracking.environment import environment


@dataclass
class Walk:
    """What was added up so far."""

    true: tree.Tree  # Σ Δ_s, of rounds that are over
    now: tree.Tree  # Σ n_j Δ_j of the round at hand
    weight: float = 0.0
    predicted: float = 0.0  # energy


@dataclass(frozen=True, kw_only=True)
class Watched(Ferret):
    """Ferret whose clients' true changes are looked at as they are measured. Same numbers as Ferret's."""

    walk: Walk = field(compare=False, repr=False)

    def client_update(self, task: Any, public: Any, client: Any, data: Any, key: Any) -> Any:
        """As Ferret's; then the change counts with the reply's weight."""
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
    """Play the recipe; loss and norms at every evaluation, and what each kind of tensor's noise costs at the end."""
    if not isinstance(recipe.algorithm, Ferret) or recipe.algorithm.keys != "shared":
        raise UserError("this recipe's method is not Ferret with shared keys")
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
    for record in experiment.play(state, engine):
        _close(experiment.recipe.algorithm, walk, counts, state.public)
        counts = _counts(experiment.recipe.algorithm, state.public)
        if record.round % recipe.evaluation.every == 0 or record.round == recipe.rounds:
            points.append(_point(experiment, state, engine, walk, start, main))
            print(points[-1], file=sys.stderr, flush=True)
    result = {"method": recipe.tables()["algorithm"], "model": recipe.model.name, "seed": recipe.seed, "points": points}
    return {**result, **(_kinds(experiment, state, walk, start, main) if by_kind else {})}


def _counts(algorithm: Any, public: FerretPublic) -> tuple[int, ...]:
    """K_l of the coming round."""
    counts: tuple[int, ...] = algorithm.projector(public).counts(decode_norms(public.norms))
    return counts


def _close(algorithm: Any, walk: Walk, counts: tuple[int, ...], public: FerretPublic) -> None:
    """The round is over: its mean change joins the walk."""
    for name, change in walk.now.items():
        change.div_(walk.weight)
        walk.true[name].add_(change)
    projector = algorithm.projector(public)
    norms = projector.norms(iter(walk.now.items()))
    for block, count, norm in zip(projector.blocks, counts, norms, strict=True):
        walk.predicted += (block.size / count - 1) * norm**2
    for change in walk.now.values():
        change.zero_()
    walk.weight = 0.0


def _noise(state: RunState, walk: Walk, start: tree.Tree) -> Iterator[tuple[str, Tensor]]:
    """What to add to the weights to be where the true changes lead, a tensor at a time."""
    for name, weight in state.public.weights.items():
        yield name, start[name] - weight - walk.true[name]


def _point(
    experiment: Experiment, state: RunState, engine: Any, walk: Walk, start: tree.Tree, main: str
) -> dict[str, float]:
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
    """What the noise of each kind of tensor costs, on the true path and without the others."""
    weights = state.public.weights
    noise = dict(_noise(state, walk, start))

    def loss() -> float:
        rows, size = experiment.tokens.held_out(main), experiment.recipe.evaluation.batch_size
        with experiment.recipe.algorithm.model(experiment.task, state.public) as model:
            return evaluate(model, experiment.loss, rows, size).loss

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
        # the mean of both signs: what a slope gains by chance on one side it loses on the other
        rows.append({"kind": kind, "weights": size, "noise": norm, "rise": (there + back) / 2 - true})
        print(rows[-1], file=sys.stderr, flush=True)
    return {"loss_of_the_true_path": true, "kinds": rows}


def kind_of(name: str) -> str:
    """A parameter's name without its place: ``model.layers.3.mlp.up_proj.weight`` is of the kind ``mlp.up_proj``."""
    return re.sub(r"^.*\.\d+\.|^model\.|\.weight$", "", name)


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="NAME=VALUE")
    parser.add_argument(
        "--by-kind", action="store_true", help="also say in which tensors the noise is, and what it costs"
    )
    arguments = parser.parse_args()
    result = watch(from_tables(read_tables(arguments.recipe, arguments.overrides)), arguments.by_kind)
    print(json.dumps({**result, "machine": environment()}, indent=1))


if __name__ == "__main__":
    main()
