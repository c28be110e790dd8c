"""``fedferret advise``: how many coordinates Ferret needs, from a probe of a few rounds and a formula.

    probe      P rounds of FedAvg at the recipe's settings. Ferret encodes and decodes the same updates.
    ε          the weights that Ferret's last probed round led to, less those of FedAvg: the noise of one round
    rise(s)    (L(w + √s ε) + L(w − √s ε)) / 2 − L(w), L the held-out loss at FedAvg's weights w: ½ s εᵀHε
    q          the same rise after one more round of FedAvg from w and from either side, over the rise before: what
               training leaves of a round's noise, and of what the noise led astray; at most 1
    walk       R rounds draw independent noise with energies in proportion to 1/K, K₀ the recipe's number; of it
               M = (Σ_{r < R} q^r)^(1 − b) R^b rounds are left at the end, between all that fades at one pace
               and a walk of which nothing fades, b = ``WALK_EXPONENT``
    G(R)       FedAvg's loss reduction over R rounds: given, or G(P) (R/P)^a with a = ``GAIN_EXPONENT``
    share(K)   1 − rise(M K₀/K) / G(R)

The noise holds the allocation, the code and the cohort, since the method itself makes it. The formula has two fitted
numbers, a and b, both from one grid of the small model. It leaves out that later updates are shorter or longer than
the probed ones, that curvature changes, and what the noise costs beyond its square. docs/advise.md has its errors.

Cost: P + 3 rounds of training and P + 10 evaluations, about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedferret.algorithms.ferret import Ferret
from fedferret.bases.blocks import pack
from fedferret.config import Recipe
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Replica, Task
from fedferret.experiment import Experiment
from fedferret.local.first_order import FirstOrder, Trained

SHARES = (0.90, 0.97, 0.99)
GAIN_EXPONENT = 0.25  # a: FedAvg's row of recipes/small/breaks.toml after 60 and 150 rounds
WALK_EXPONENT = 0.4  # b: its row of 4,096 coordinates in rounds 10 to 50, 60 to 100 and 110 to 150


@dataclass(frozen=True, kw_only=True)
class Recording(FirstOrder):
    """The recipe's training, which also sums the clients' exact updates of a round."""

    by_examples: bool
    sums: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # Σ n_j Δ_j
    shares: list[float] = field(default_factory=list, compare=False, repr=False)  # n_j
    facts: list[tuple[float, float, float]] = field(default_factory=list, compare=False, repr=False)

    def train(self, task: Task, data: Examples, key: Key, **options: Any) -> Trained:
        """As ``FirstOrder.train``; then the update is added up.

        Args:
            task: as there.
            data: likewise.
            key: likewise.
            options: likewise.
        """
        before = tree.clone(tree.parameters(task.model))
        trained = super().train(task, data, key, **options)
        weight, absolute, square = float(len(data)) if self.by_examples else 1.0, 0.0, 0.0
        for name, delta in tree.difference(before, trained.weights):
            absolute, square = absolute + float(delta.abs().sum()), square + float(delta.square().sum())
            if name in self.sums:
                self.sums[name].add_(delta, alpha=weight)
            else:
                self.sums[name] = delta.mul_(weight)
        self.shares.append(weight)
        self.facts.append((weight, absolute, math.sqrt(square)))
        return trained

    def step_(self, weights: Mapping[str, Tensor], rate: float) -> None:
        """Step along the mean update, as FedAvg does, and begin a new round.

        Args:
            weights: changed in place.
            rate: the server's.
        """
        for name, target in weights.items():
            target.add_(self.sums[name], alpha=-rate / sum(self.shares))
        self.reset()

    def reset(self) -> None:
        """Begin a new round."""
        self.sums.clear()
        self.shares.clear()


@dataclass(frozen=True)
class Probe:
    """What the probed rounds showed.

    Attributes:
        losses: FedAvg's held-out loss before round 1 and after every probed round.
        rises: pairs of s and the rise of the loss, s ascending.
        persistence: q, what one round of training leaves of a rise.
        participation: (‖Δ‖₁/‖Δ‖₂)², the mean over clients.
        norm: ‖Δ‖, the mean over clients.
        noise: ‖ε‖ of one round.
        shapes: of the tuned tensors.
        framing: bytes of a probed message beyond the method's formula.
    """

    losses: tuple[float, ...]
    rises: tuple[tuple[float, float], ...]
    persistence: float
    participation: float
    norm: float
    noise: float
    shapes: dict[str, tuple[int, ...]]
    framing: int

    @property
    def weights(self) -> int:
        """d."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Advice:
    """Coordinates for one share, and their cost.

    Attributes:
        share: of FedAvg's loss reduction.
        coordinates: setting ``coordinates``; the number of weights at most.
        bytes_up: of a message, framing included.
        enough: whether the share needs no more coordinates than there are.
    """

    share: float
    coordinates: int
    bytes_up: int
    enough: bool


def check(recipe: Recipe) -> Ferret:
    """Refuse a recipe that the formula is not for.

    Args:
        recipe: resolved.

    Returns:
        The recipe's method.

    Raises:
        UserError: for another method, or settings under which noise does not walk.
    """
    method = recipe.algorithm
    if not isinstance(method, Ferret) or method.name != "ferret":
        raise UserError(f'algorithm.name="{method.name}": advise knows the noise of "ferret" alone; give such a recipe')
    if method.server_momentum or method.error_feedback:
        given = f"server_momentum={method.server_momentum}, error_feedback={str(method.error_feedback).lower()}"
        raise UserError(f"{given}: the formula is for neither; set server_momentum=0 and error_feedback=false")
    if recipe.model.dtype != "fp32":
        raise UserError(f'model.dtype="{recipe.model.dtype}": advise measures noise in fp32; set model.dtype="fp32"')
    return method


def probe(recipe: Recipe, rounds: int, gain: float | None, log: Callable[[str], None]) -> Probe:
    """Run rounds of FedAvg, encode them as Ferret does, and measure what the noise costs.

    Args:
        recipe: of Ferret.
        rounds: P, at least 1.
        gain: FedAvg's loss reduction over all rounds, nats per token; None: extrapolated.
        log: called with a line on every step.

    Raises:
        UserError: the recipe cannot run, or FedAvg gains nothing in the probed rounds.
    """
    method = check(recipe)
    given = {item.name: getattr(method.training, item.name) for item in fields(method.training)}
    training = Recording(**given, by_examples=method.weighting == "examples")
    experiment = Experiment.load(replace(recipe, algorithm=replace(method, training=training)), log=log)
    state = experiment.initial_state()
    engine = experiment.engine(state, on_client_start=lambda client: log(f"round {state.round + 1}: {client} trains"))
    weights: dict[str, Tensor] = state.public.weights
    main = next(iter(experiment.data.held_out))

    def loss(what: str) -> float:
        with experiment.recipe.algorithm.model(experiment.task, state.public) as model:
            assert model is not None  # Ferret has a global model
            value = experiment.evaluator.figures(model, main)["loss"]
        log(f"{what}: held-out loss {value:.4f}")
        return value

    try:
        losses, exact = [loss("before round 1")], tree.clone(weights)
        noise: dict[str, Tensor] = {}
        records = experiment.run_rounds(state, engine)
        for number, record in zip(range(1, rounds + 1), records, strict=False):
            training.step_(exact, method.server_learning_rate)
            sent, cohort = max(record.bytes_up.values()), len(record.cohort)
            if number == rounds:
                noise = {name: weights[name] - each for name, each in exact.items()}
            tree.copy_(weights, exact)
            losses.append(loss(f"FedAvg, round {number}"))
        if not losses[-1] < losses[0]:
            raise UserError(
                f"FedAvg gains nothing in {rounds} rounds: probe more (--rounds), or lower the learning rate"
            )
        gain = gain or extrapolated(losses, recipe.rounds)

        def put(shift: float) -> None:
            for name, target in weights.items():
                torch.add(exact[name], noise[name], alpha=shift, out=target)

        def rise(scale: float) -> float:
            sides = []
            for sign in (1.0, -1.0):
                put(sign * math.sqrt(scale))
                sides.append(loss(f"noise of {scale:.3g} rounds ({sign:+.0f})"))
            value = sum(sides) / 2 - losses[-1]
            return value if math.isfinite(value) else math.inf

        wanted = (1 - SHARES[1]) * gain
        rises = _rises(rise, 4.0, wanted)
        scale, before = min(rises, key=lambda each: abs(math.log(each[1] / wanted)))
        facts = list(training.facts)
        kept = _kept(experiment, training, weights, lambda sign: put(sign * math.sqrt(scale)), loss, before)
    finally:
        engine.close()
    norms = [norm for _, _, norm in facts]
    spread = [absolute**2 / norm**2 for _, absolute, norm in facts if norm]
    energy = sum(float(each.square().sum()) for each in noise.values())
    means = [sum(each) / len(each) for each in (spread, norms)]
    shapes = tree.shapes(weights)
    framing = sent - method.wire_cost(shapes, cohort, rounds).up_most
    return Probe(tuple(losses), rises, kept, means[0], means[1], math.sqrt(energy), shapes, round(framing))


def _kept(
    experiment: Experiment,
    training: Recording,
    weights: Mapping[str, Tensor],
    put: Callable[[float], None],
    loss: Callable[[str], float],
    before: float,
) -> float:
    """q: the rise of the loss after one more round of FedAvg from either side, over the rise before it; 0 to 1."""
    seed, ends = experiment.recipe.seed, []
    key = Key.of(seed, "advise")
    cohort = key.sample(sorted(experiment.data.clients), experiment.recipe.clients.per_round)
    method = check(experiment.recipe)
    for sign in (0.0, 1.0, -1.0):
        put(sign)
        training.reset()
        for client in cohort:
            tree.copy_(tree.parameters(experiment.model), weights)
            task = replace(experiment.task, replica=Replica(experiment.model), round=1)
            training.train(task, experiment.examples[client], key.fold(client))
        training.step_(weights, method.server_learning_rate)
        ends.append(loss(f"a round of FedAvg from there ({sign:+.0f})"))
    after = (ends[1] + ends[2]) / 2 - ends[0]
    return min(1.0, max(0.0, after / before)) if math.isfinite(after) else 1.0


def _rises(rise: Callable[[float], float], first: float, wanted: float) -> tuple[tuple[float, float], ...]:
    """The rise at scales from ``first`` to one near where it is ``wanted``; s ascending."""
    points = [(first, rise(first))]
    for _ in range(5):
        scale, value = points[-1]
        if value > 0 and 0.3 * wanted <= value <= 3 * wanted and len(points) > 1:
            break
        step = wanted / value if value > 0 and math.isfinite(value) else 0.01 if value > 0 else 30.0
        points.append((scale * min(max(step, 1e-3), 1e3), 0.0))
        points[-1] = points[-1][0], rise(points[-1][0])
    kept = sorted((scale, value) for scale, value in points if 0 < value < math.inf)
    if not kept:
        raise UserError(
            "the noise of the probe costs no loss that can be measured: give a recipe with fewer coordinates"
        )
    return tuple(kept)


def extrapolated(losses: tuple[float, ...] | list[float], rounds: int) -> float:
    """G(R), FedAvg's loss reduction after all rounds, from that of the probed ones.

    Args:
        losses: before round 1 and after every probed round.
        rounds: R.
    """
    return float((losses[0] - losses[-1]) * max(1.0, rounds / (len(losses) - 1)) ** GAIN_EXPONENT)


def memory(kept: float, rounds: int) -> float:
    """M, the rounds of noise that are left at the end: (Σ_{r < R} q^r)^(1 − b) R^b.

    Args:
        kept: q, at most 1.
        rounds: R.
    """
    left = float(rounds) if kept >= 1 else float((1 - kept**rounds) / (1 - kept))
    return float(left ** (1 - WALK_EXPONENT) * rounds**WALK_EXPONENT)


def rise_at(found: Probe, scale: float) -> float:
    """The rise of the loss at a scale, between the measured ones on a power law and beyond them in proportion.

    Args:
        found: by the probe.
        scale: s.
    """
    points = found.rises
    if scale <= points[0][0]:
        return points[0][1] * scale / points[0][0]
    for (low, below), (high, above) in pairwise(points):
        if scale <= high:
            return float(below * (above / below) ** (math.log(scale / low) / math.log(high / low)))
    return points[-1][1] * scale / points[-1][0]


def share(found: Probe, recipe: Recipe, coordinates: float, gain: float | None = None) -> float:
    """The share of FedAvg's loss reduction that the formula forecasts.

    Args:
        found: by the probe.
        recipe: probed.
        coordinates: K, as the setting counts them.
        gain: G(R), nats per token; None: extrapolated.

    Returns:
        At most 1; below 0 where the loss would rise.
    """
    total = gain or extrapolated(found.losses, recipe.rounds)
    scale = memory(found.persistence, recipe.rounds) * check(recipe).coordinates / coordinates
    return 1 - rise_at(found, scale) / total


def advise(found: Probe, recipe: Recipe, gain: float | None = None) -> list[Advice]:
    """The fewest coordinates for every share, by bisection.

    Args:
        found: by the probe.
        recipe: probed.
        gain: G(R), nats per token; None: extrapolated.

    Returns:
        One line per share of ``SHARES``.
    """
    method = check(recipe)
    lines = []
    least = -(-len(pack({name: math.prod(shape) for name, shape in found.shapes.items()})) // method.group_size)
    for wanted in SHARES:
        low, high = float(least), float(found.weights)
        enough = share(found, recipe, high, gain) >= wanted
        while enough and high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if share(found, recipe, middle, gain) >= wanted else (middle, high)
        count = least if share(found, recipe, least, gain) >= wanted else min(math.ceil(high), found.weights)
        up = replace(method, coordinates=count).wire_cost(found.shapes, recipe.clients.per_round, 1).up_most
        lines.append(Advice(wanted, count, round(up) + found.framing, enough))
    return lines
