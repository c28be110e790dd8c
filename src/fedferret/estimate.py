"""What a recipe costs before it runs: bytes by the method's formula; memory and time are rough.

bytes     the method's ``wire_cost``, the mean over rounds of the most; FedAvg's is 4 d up and 4 d down
disk      the log, the server's state and each client's, with the rounds that can be rewound (``disk.py``)
memory    weights in model.dtype (two copies of the tuned ones, one with memory = "lean") or quantised; fp32 masters of
          bf16 weights, gradients and optimizer state of the tuned ones; activations; zeroth-order training has the
          weights alone
time      the data is read and its lengths are taken (characters / 4 where the tokenizer is not at hand), then
          operations   6 d' per trained token (4 d' where weights are frozen, 4 d' for two forward passes), 2 d' per
                       evaluated token, with d' the weights without the vocabulary; the vocabulary's on response tokens;
                       of an image as PyTorch counts them
          memory       the passes over the weights that steps, clients and evaluations make
          at the rates of a product of the batch's size and of a copy, both measured here for a fifth of a second
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from fedferret.config import Recipe
from fedferret.core.keys import Key
from fedferret.core.messages import framing_bytes
from fedferret.tracking.units import as_bytes, as_count, as_duration

if TYPE_CHECKING:
    from torch import nn

    from fedferret.data.examples import Example, FederatedData

_EFFICIENCY = 0.75  # of a product of the batch's size: softmax, norms and small layers take the rest
_PADDING = 1.2  # padded tokens per token, in batches sorted by length
_PER_TURN = 8  # tokens that a chat template adds to a turn
_SAMPLE = 200  # examples of which lengths are taken
_STEP_PASSES = 10  # over the tuned weights per optimizer step: gradients written, clipped, applied, zeroed
_BATCH_PASSES = 4  # over all weights per batch: forward and backward read them
_CLIENT_PASSES = 12  # over the tuned weights per client: load, difference, project or encode, apply


@dataclass(frozen=True)
class Estimate:
    """The costs of a recipe. Bytes are exact up to framing, which has a bound; the other figures are rough."""

    tuned: int  # weights
    added: int  # of these, where all of the model's are tuned and the method has more
    parameters: int  # of the whole model
    bytes_up: float  # per client and round
    bytes_down: float  # per client and round, for a client that was there the round before
    framing: int  # bytes of one message at most, beyond those two
    bytes_fedavg: int  # per client and round, one way
    client_state_bytes: float  # on each client that took part, between its rounds
    clients: int  # that take part at most
    states: int  # of clients, that are kept at most
    server_bytes: float  # the log and the server's state, at most
    history: int  # rounds that can be rewound
    memory: float  # bytes
    seconds: float
    by_rounds: tuple[tuple[str, float, float], ...]  # where rounds differ: which, and a client's bytes up and down

    def __str__(self) -> str:
        states = as_bytes(self.client_state_bytes)
        states += f", for {self.clients} clients {as_bytes(self.client_state_bytes * self.states)}"
        tuned = f"{as_count(self.tuned - self.added)} of {as_count(self.parameters)}"
        tuned += f", and {as_count(self.added)} that the method adds" if self.added else ""
        return "\n".join(
            [
                f"# weights tuned               {tuned}",
                f"# up, per client and round    {as_bytes(self.bytes_up)} (FedAvg: {as_bytes(self.bytes_fedavg)})",
                f"# down, per client and round  {as_bytes(self.bytes_down)} (FedAvg: {as_bytes(self.bytes_fedavg)})",
                *(f"#   {which:<24}  {as_bytes(up)} up, {as_bytes(down)} down" for which, up, down in self.by_rounds),
                f"# framing of a message        up to {as_bytes(self.framing)} more: names and lengths",
                f"# disk, log and server        {as_bytes(self.server_bytes)} at most, {self.history} past rounds kept",
                *([f"# disk, per client            {states} at most"] if self.client_state_bytes else []),
                f"# memory, roughly             {as_bytes(self.memory)}",
                f"# time, roughly               {as_duration(self.seconds)} on this machine, evaluation included",
            ]
        )


@dataclass(frozen=True)
class _Lengths:
    """Means over examples, in tokens, and how many examples there are."""

    tokens: float  # of prompt and response, padding included
    response: float
    count: float  # of a client, or of all held-out sets

    @classmethod
    def of(cls, examples: Sequence[Example], max_tokens: int, count: float, key: Key) -> _Lengths:
        """The lengths of a sample of ``examples``."""
        sample = key.sample(examples, min(_SAMPLE, len(examples)))
        if not sample:
            return cls(max_tokens / 2, max_tokens / 4, count or 100)  # a site's data is not here
        whole = [_tokens("".join(turn.content for turn in each.turns), len(each.turns)) for each in sample]
        response = [_tokens(each.response, 1) for each in sample]
        return cls(
            statistics.fmean(min(max_tokens, _PADDING * each) for each in whole),
            statistics.fmean(min(max_tokens, each) for each in response),
            count,
        )


_Forward: TypeAlias = "Callable[[_Lengths], float]"


def estimate(recipe: Recipe) -> Estimate:
    """The cost of a recipe; data is read, weights are not.

    Raises:
        UserError: if the recipe cannot run.
    """
    from fedferret.build import check, load_data
    from fedferret.disk import all_state_bytes, kept_states, server_bytes
    from fedferret.local.first_order import FirstOrder

    shapes_of = check(recipe)
    data, history = load_data(recipe), recipe.execution.history
    numbers, cohort = range(1, recipe.rounds + 1), recipe.clients.per_round

    def weights(number: int) -> int:
        return sum(math.prod(shape) for shape in shapes_of(number).values())

    tuned = max(map(weights, numbers))
    skeleton = recipe.objective.skeleton(recipe.model.name)
    every = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters()}
    parameters = sum(math.prod(shape) for shape in every.values())
    costs = [recipe.algorithm.wire_cost(shapes_of(number), cohort, number) for number in numbers]
    training = getattr(recipe.algorithm, "training", None)
    first_order = training if isinstance(training, FirstOrder) else None
    copies = 1 if recipe.execution.memory == "lean" else 2
    gradients = 1 if first_order else 0
    optimizer = 2 if first_order and first_order.optimizer == "adamw" else 0
    momentum = 1 if first_order and first_order.momentum else 0
    batch_tokens = recipe.text.max_tokens * (training.batch_size if training else recipe.evaluation.batch_size)
    activations = 40 * batch_tokens * math.sqrt(parameters)  # bytes; SmolLM2 at 4 x 128 tokens: 0.24 GB
    width = 4 if recipe.model.dtype == "fp32" else 2
    own = width if tuned == parameters else 4  # an adapter is fp32
    masters = gradients if own == 2 else 0
    held = _base_bytes(recipe, skeleton, width) + tuned * own * (copies - 1)
    held += 4 * tuned * (masters + gradients + optimizer + momentum)
    states = all_state_bytes(recipe, len(data.clients))
    return Estimate(
        tuned,
        max(tuned - parameters if every.keys() <= shapes_of(number).keys() else 0 for number in numbers),
        parameters,
        statistics.fmean(cost.up_most for cost in costs),
        statistics.fmean(cost.down_most for cost in costs),
        max(framing_bytes(shapes_of(number)) for number in numbers),
        4 * parameters,
        max(each.client for each in states),
        min(len(data.clients), recipe.rounds * cohort),
        kept_states(len(data.clients), recipe.rounds, cohort, history),
        server_bytes(recipe, states),
        history,
        held + gradients * activations * width / 4 + 0.5e9,  # half a GB of libraries
        _seconds(recipe, data, training, skeleton, tuned),
        _by_rounds([(cost.up_most, cost.down_most) for cost in costs]),
    )


def _by_rounds(costs: Sequence[tuple[float, float]]) -> tuple[tuple[str, float, float], ...]:
    """Rounds of equal costs, in words, with their costs; nothing where all are equal."""
    found, first = [], 1
    for cost, group in groupby(costs):
        last = first + len(list(group)) - 1
        found.append((f"round {first}" if first == last else f"rounds {first} to {last}", *cost))
        first = last + 1
    return tuple(found) if len(found) > 1 else ()


def _base_bytes(recipe: Recipe, model: nn.Module, width: int) -> float:
    """Of a base's weights; quantised are all matrices but those of the largest shape, which is the vocabulary's.

    Args:
        recipe: with the model's precision.
        model: the base's skeleton.
        width: bytes of a weight that is not quantised.
    """
    shapes = [tuple(weight.shape) for weight in model.parameters()]
    total = float(width * sum(map(math.prod, shapes)))
    if recipe.model.quantised is not None:
        matrices = [shape for shape in shapes if len(shape) == 2]
        largest = max(matrices, key=math.prod)
        codes = sum(math.prod(shape) for shape in matrices if shape != largest)
        total -= codes * (width - (0.52 if recipe.model.quantised == "4-bit" else 1.0))
    return total


def _forward(recipe: Recipe, model: nn.Module, data: FederatedData, body: int, vocabulary: int) -> _Forward:
    """The operations of a forward pass of one example, as a function of the examples' lengths."""
    images = (each.image for part in (data.clients, data.held_out) for rows in part.values() for each in rows[:1])
    if image := next(images, None):
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            model(SimpleNamespace(pixels=torch.zeros(1, *image.shape, device="meta")))
        total = float(counter.get_total_flops())
        return lambda lengths: total
    scored = vocabulary if recipe.objective.generates else 0  # a classifier has no product with its vocabulary
    return lambda lengths: 2 * (lengths.tokens * body + lengths.response * scored)


def _seconds(recipe: Recipe, data: FederatedData, training: Any, model: nn.Module, tuned: int) -> float:
    """Of all rounds, evaluations and the local-only baseline."""
    shapes = [tuple(weight.shape) for weight in model.parameters()]
    key, most = Key.of(recipe.seed, "estimate"), recipe.text.max_tokens
    trained = [example for examples in data.clients.values() for example in examples]
    held_out = [example for examples in data.held_out.values() for example in examples]
    client = _Lengths.of(trained, most, len(trained) / len(data.clients), key)
    scored = _Lengths.of(held_out, most, len(held_out), key)
    matrices = [shape for shape in shapes if len(shape) == 2]
    vocabulary = max(math.prod(shape) for shape in matrices)
    body = sum(math.prod(shape) for shape in shapes) - vocabulary
    width = min(min(shape) for shape in matrices if math.prod(shape) == vocabulary)
    batch = training.batch_size if training else recipe.evaluation.batch_size
    copy_seconds, rate = _rates(batch * client.tokens, width)
    trainings = recipe.rounds * recipe.clients.per_round
    if data.held_out:
        trainings += recipe.rounds * min(recipe.evaluation.local_only_clients, len(data.clients))
    batches = training.total_batches(round(client.count)) if training else 0
    steps = training.total_steps(round(client.count)) if training else 0
    backward = hasattr(training, "accumulate")
    share = tuned / sum(math.prod(shape) for shape in shapes)
    per_weight = 4 + 2 * min(1.0, share) if backward else 4.0  # a frozen weight needs no gradient
    if recipe.model.train == "head":
        per_weight = 2.0  # no gradient goes through the frozen part
    examples = batches * batch
    forward = _forward(recipe, model, data, body, vocabulary)
    operations = trainings * examples * per_weight / 2 * forward(client)
    evaluations = math.ceil(recipe.rounds / recipe.evaluation.every) + 1
    operations += evaluations * scored.count * forward(scored)
    if recipe.scores_clients:  # all clients at either end, the cohort in between
        asked = 2 * len(data.clients) + (evaluations - 2) * recipe.clients.per_round
        kept = sum(map(len, data.client_held_out.values())) / len(data.clients)
        operations += asked * kept * forward(client)
    passes = trainings * (steps * _STEP_PASSES * tuned + batches * _BATCH_PASSES * (body + vocabulary))
    passes += trainings * _CLIENT_PASSES * tuned
    return operations / (_EFFICIENCY * rate) + passes * copy_seconds


def _tokens(text: str, turns: int) -> float:
    return len(text) / 4 + _PER_TURN * turns


def _rates(rows: float, width: int) -> tuple[float, float]:
    """Seconds to read and write one fp32 value, and operations per second of a product of a batch with a layer."""
    import torch

    left = torch.ones(max(1, min(4096, round(rows))), width)
    right = torch.ones(width, 3 * width)
    values = torch.ones(1 << 24)
    left @ right
    operations = 2 * left.numel() * 3 * width
    return _timed(lambda: values.mul_(1.0)) / values.numel(), operations / _timed(lambda: left @ right)


def _timed(work: Any) -> float:
    """Seconds of one call, over a tenth of a second."""
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        work()
        calls += 1
    return (time.perf_counter() - started) / calls
