"""``fedferret advise``: how many coordinates Ferret needs, from a probe of a few rounds and a formula.

    probe      P rounds of FedAvg at the recipe's settings. Ferret encodes and decodes the same updates.
    ε          the weights that Ferret's last probed round led to, less those of FedAvg: the noise of one round
    rise(s)    (L(w + √s ε) + L(w − √s ε)) / 2 − L(w), L the held-out loss at FedAvg's weights w: ½ s εᵀHε
    q          the same rise after one more round of FedAvg from w and from either side, over the rise before: what
               training leaves of a round's noise, and of what the noise led astray; at most 1
    walk       R rounds draw independent noise with energies in proportion to 1/K, K₀ the recipe's number, and to e_r,
               the square of the server's learning rate over that of round P; of it M = (Σ q^(R − r) e_r)^(1 − b)
               (Σ e_r)^b rounds are left at the end, between all that fades at one pace and a walk of which nothing
               fades, b = ``WALK_EXPONENT``
    G(R)       FedAvg's loss reduction over R rounds: given, or G(P) (R/P)^a with a = ``GAIN_EXPONENT``
    share(K)   1 − rise(M K₀/K) / G(R)

The noise holds the allocation, the code and the cohort, since the method itself makes it. The formula has two fitted
numbers, a and b, both from one grid of the small model. It leaves out that later updates are shorter or longer than
the probed ones, that curvature changes, and what the noise costs beyond its square. docs/advise.md has its errors.

Cost: P + 3 rounds of training and P + 10 evaluations, about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from fedferret.advice_checks import ROUNDING, check, check_complete, check_gain, check_rounds
from fedferret.advice_recording import Recording
from fedferret.bases.blocks import pack
from fedferret.config import Recipe
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Replica
from fedferret.experiment import ENGINES, Experiment
from fedferret.local.schedules import scheduled

SHARES = (0.90, 0.97, 0.99)
GAIN_EXPONENT = 0.25  # a: FedAvg's row of recipes/small/breaks.toml after 60 and 150 rounds
WALK_EXPONENT = 0.4  # b: its row of 4,096 coordinates in rounds 10 to 50, 60 to 100 and 110 to 150


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
        coordinates: setting ``coordinates``; ``most`` at most.
        bytes_up: of a message, the mean over rounds, framing included.
        enough: whether the share needs no more coordinates than there are.
    """

    share: float
    coordinates: int
    bytes_up: int
    enough: bool


def probe(recipe: Recipe, rounds: int, gain: float | None, log: Callable[[str], None]) -> Probe:
    """Run rounds of FedAvg, encode them as Ferret does, and measure what the noise costs.

    Args:
        recipe: of Ferret.
        rounds: P, at least 1.
        gain: FedAvg's loss reduction over all rounds, nats per token; None: extrapolated.
        log: called with a line on every step.

    Raises:
        UserError: the recipe cannot run or be probed, or the probe shows too little.
    """
    method = check(recipe)
    check_rounds(recipe, rounds)
    if recipe.execution.engine not in ENGINES:
        log(f'execution.engine="{recipe.execution.engine}": the probe runs in this process; its numbers are the same')
        recipe = replace(recipe, execution=replace(recipe.execution, engine="in-process"))
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
        check_gain(gain, losses[0])
        records = experiment.run_rounds(state, engine)
        for number, record in zip(range(1, rounds + 1), records, strict=False):
            check_complete(record)
            training.step_(exact, _rate(recipe, number))
            sent, cohort = max(record.bytes_up.values()), len(record.cohort)
            if number == rounds:
                noise = {name: weights[name] - each for name, each in exact.items()}
            tree.copy_(weights, exact)
            losses.append(loss(f"FedAvg, round {number}"))
        if not losses[0] - losses[-1] > ROUNDING * losses[0]:
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
        rises = _rises(rise, 4.0, wanted, ROUNDING * losses[-1], sum(energies(recipe, rounds)))
        scale, before = min(rises, key=lambda each: abs(math.log(each[1] / wanted)))
        facts = list(training.facts)
        kept = _kept(experiment, training, weights, lambda sign: put(sign * math.sqrt(scale)), loss, before, rounds)
    finally:
        engine.close()
    norms = [norm for _, _, norm in facts]
    spread = [absolute**2 / norm**2 for _, absolute, norm in facts if norm]
    energy = sum(float(each.square().sum()) for each in noise.values())
    means = [sum(each) / len(each) for each in (spread, norms)]
    shapes = tree.shapes(weights)
    framing = sent - method.wire_cost(shapes, cohort, rounds).up_most
    return Probe(tuple(losses), rises, kept, means[0], means[1], math.sqrt(energy), shapes, round(framing))


def _rate(recipe: Recipe, number: int) -> float:
    """The server's learning rate in a round."""
    method = check(recipe)
    return scheduled(method.schedule, method.server_learning_rate, number, recipe.rounds)


def _kept(
    experiment: Experiment,
    training: Recording,
    weights: Mapping[str, Tensor],
    put: Callable[[float], None],
    loss: Callable[[str], float],
    before: float,
    rounds: int,
) -> float:
    """q: the rise of the loss after one more round of FedAvg from either side, over the rise before it; 0 to 1."""
    recipe, ends = experiment.recipe, []
    key = Key.of(recipe.seed, "advise")
    cohort = key.sample(sorted(experiment.data.clients), recipe.clients.per_round)
    following = min(rounds + 1, recipe.rounds)
    for sign in (0.0, 1.0, -1.0):
        put(sign)
        training.reset()
        for client in cohort:
            tree.copy_(tree.parameters(experiment.model), weights)
            task = replace(experiment.task, replica=Replica(experiment.model), round=following)
            training.train(task, experiment.examples[client], key.fold(client))
        training.step_(weights, _rate(recipe, following))
        ends.append(loss(f"a round of FedAvg from there ({sign:+.0f})"))
    after = (ends[1] + ends[2]) / 2 - ends[0]
    return min(1.0, max(0.0, after / before)) if math.isfinite(after) else 1.0


def _rises(
    rise: Callable[[float], float], first: float, wanted: float, least: float, most: float
) -> tuple[tuple[float, float], ...]:
    """The rise at scales from ``first`` to one near where it is ``wanted``; s ascending, all rises above ``least``.

    Raises UserError where the noise of all rounds, of scale ``most``, has no rise above ``least``.
    """
    unseen = "the noise of the probe costs no loss that can be measured: give a recipe with fewer coordinates"
    points = [(first, rise(first))]
    for _ in range(5):
        scale, value = points[-1]
        if scale >= most and abs(value) <= least:
            raise UserError(unseen)
        if value > least and 0.3 * wanted <= value <= 3 * wanted and len(points) > 1:
            break
        step = wanted / value if least < value < math.inf else 0.01 if value > least else 30.0
        scale *= min(max(step, 1e-3), 1e3)
        points.append((scale, rise(scale)))
    kept = sorted((scale, value) for scale, value in points if least < value < math.inf)
    if not kept:
        raise UserError(unseen)
    return tuple(kept)


def extrapolated(losses: tuple[float, ...] | list[float], rounds: int) -> float:
    """G(R), FedAvg's loss reduction after all rounds, from that of the probed ones.

    Args:
        losses: before round 1 and after every probed round.
        rounds: R.
    """
    return float((losses[0] - losses[-1]) * max(1.0, rounds / (len(losses) - 1)) ** GAIN_EXPONENT)


def energies(recipe: Recipe, probed: int) -> list[float]:
    """e_r, the energies of every round's noise relative to those of round P: the server's learning rate, squared.

    Args:
        recipe: probed.
        probed: P.
    """
    method, rounds, probed_rate = check(recipe), recipe.rounds, _rate(recipe, probed)
    numbers = range(1, rounds + 1)
    return [(scheduled(method.schedule, method.server_learning_rate, n, rounds) / probed_rate) ** 2 for n in numbers]


def memory(kept: float, energies: Sequence[float]) -> float:
    """M, the rounds of noise that are left at the end: (Σ q^(R − r) e_r)^(1 − b) (Σ e_r)^b.

    Args:
        kept: q, at most 1.
        energies: e_r, round by round.
    """
    left = 0.0
    for energy in energies:
        left = kept * left + energy
    return float(left ** (1 - WALK_EXPONENT) * sum(energies) ** WALK_EXPONENT)


def most(found: Probe, recipe: Recipe) -> int:
    """The coordinates beyond which a run stays the same: as many as there are groups of weights.

    Args:
        found: by the probe.
        recipe: probed.
    """
    return -(-found.weights // check(recipe).group_size)


def used(found: Probe, recipe: Recipe) -> int:
    """K₀: the recipe's coordinates, at most ``most``.

    Args:
        found: by the probe.
        recipe: probed.
    """
    return min(check(recipe).coordinates, most(found, recipe))


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
        coordinates: K, as the setting counts them; more than ``most`` are as ``most``.
        gain: G(R), nats per token; None: extrapolated.

    Returns:
        At most 1; below 0 where the loss would rise.
    """
    total = gain or extrapolated(found.losses, recipe.rounds)
    left = memory(found.persistence, energies(recipe, len(found.losses) - 1))
    scale = left * used(found, recipe) / min(coordinates, most(found, recipe))
    return 1 - rise_at(found, scale) / total


def advise(found: Probe, recipe: Recipe, gain: float | None = None) -> list[Advice]:
    """The fewest coordinates for every share, by bisection up to ``most``.

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
    highest, cohort = most(found, recipe), recipe.clients.per_round
    for wanted in SHARES:
        low, high = float(least), float(highest)
        enough = share(found, recipe, high, gain) >= wanted
        while enough and high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if share(found, recipe, middle, gain) >= wanted else (middle, high)
        count = least if share(found, recipe, least, gain) >= wanted else min(math.ceil(high), highest)
        chosen, numbers = replace(method, coordinates=count), range(1, recipe.rounds + 1)
        up = statistics.fmean(chosen.wire_cost(found.shapes, cohort, number).up_most for number in numbers)
        lines.append(Advice(wanted, count, round(up) + found.framing, enough))
    return lines
