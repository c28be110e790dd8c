"""What a recipe will cost, before it runs: bytes from the method's formula, memory and time roughly.

bytes     the method's ``wire_cost``; FedAvg's is 4 d up and 4 d down
disk      what the method keeps of each client, a file for each that ever took part
memory    fp32 weights (of those that are tuned two copies, one with memory = "lean"), gradients and the optimiser's
          state of those that are tuned, activations; zeroth-order training has the weights alone
time      6 d floating-point operations a token for forward and backward (4 d where weights are frozen), 4 d for a
          zeroth-order step's two forward passes, 2 d for evaluation, at the rate of a matrix product measured here for
          a fifth of a second; models reach about half of it
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from fedferret.config import Recipe
from fedferret.tracking.units import as_bytes, as_count, as_duration

_EFFICIENCY = 0.5  # of a plain matrix product; SmolLM2-135M on two cores reaches 0.4 to 0.6
_FILL = 0.6  # tokens of a batch over batch size x max_tokens; chat data seldom fills its limit


@dataclass(frozen=True)
class Estimate:
    """Costs in bytes and seconds. Bytes are exact up to framing, the rest is rough."""

    tuned: int  # weights
    parameters: int  # of the whole model
    bytes_up: float  # per client and round
    bytes_down: float  # per client and round, for one that was there the round before
    bytes_fedavg: int  # one way
    bytes_kept: float  # on each client that took part, between its rounds
    clients: int  # that take part at most
    memory: float
    seconds: float

    def __str__(self) -> str:
        kept = f"{as_bytes(self.bytes_kept)}; of {self.clients} clients {as_bytes(self.bytes_kept * self.clients)}"
        return "\n".join(
            [
                f"# weights tuned      {as_count(self.tuned)} of {as_count(self.parameters)}",
                f"# up, a client and round    {as_bytes(self.bytes_up)} (FedAvg: {as_bytes(self.bytes_fedavg)})",
                f"# down, a client and round  {as_bytes(self.bytes_down)} (FedAvg: {as_bytes(self.bytes_fedavg)})",
                *([f"# disk, a client's state    {kept} at most"] if self.bytes_kept else []),
                f"# memory, roughly    {as_bytes(self.memory)}",
                f"# time, roughly      {as_duration(self.seconds)} on this machine, evaluation included",
            ]
        )


def estimate(recipe: Recipe) -> Estimate:
    """The cost of ``recipe``. Raises UserError for a recipe that cannot run; reads no weights."""
    from fedferret import models
    from fedferret.experiment import check
    from fedferret.local.first_order import FirstOrder

    shapes = check(recipe)
    tuned = sum(math.prod(shape) for shape in shapes.values())
    parameters = sum(math.prod(shape) for shape in models.parameter_shapes(recipe.model.name).values())
    cost = recipe.algorithm.wire_cost(shapes, recipe.clients.per_round)
    training = getattr(recipe.algorithm, "training", None)
    batch_tokens = recipe.text.max_tokens * (training.batch_size if training else recipe.evaluation.batch_size)
    first_order = training if isinstance(training, FirstOrder) else None
    passes = training.total_steps(recipe.text.max_tokens) if training else 0
    if first_order:
        passes *= first_order.accumulate
    alone = min(recipe.evaluation.local_only_clients, recipe.clients.per_round)
    trainings = recipe.rounds * (recipe.clients.per_round + alone) * passes
    held_out = 2 * (getattr(recipe.data, "max_held_out", None) or 128)  # most sources have two sets
    evaluations = recipe.rounds // recipe.evaluation.every + 1
    training_tokens, evaluation_tokens = trainings * batch_tokens, evaluations * held_out * recipe.text.max_tokens
    gradients = 1 if first_order else 0
    a_token = 4 * parameters + 2 * gradients * tuned  # a frozen weight needs no gradient of its own
    operations = _FILL * (a_token * training_tokens + 2 * parameters * evaluation_tokens)
    copies = 1 if recipe.execution.memory == "lean" else 2
    optimizer = 2 if first_order and first_order.optimizer == "adamw" else 0
    momentum = 1 if first_order and first_order.momentum else 0
    activations = 40 * batch_tokens * math.sqrt(parameters)  # bytes; SmolLM2 at 4 x 128 tokens: 0.24 GB
    held = parameters + tuned * (copies - 1 + gradients + optimizer + momentum)
    return Estimate(
        tuned,
        parameters,
        cost.up,
        cost.down,
        4 * parameters,
        cost.client_state_bytes,
        recipe.rounds * recipe.clients.per_round,
        4 * held + gradients * activations + 0.5e9,  # half a GB of libraries
        operations / (_EFFICIENCY * _matrix_rate()),
    )


def _matrix_rate() -> float:
    """Floating-point operations a second of an fp32 matrix product here."""
    import torch

    size = 768
    left, right = torch.ones(size, size), torch.ones(size, size)
    left @ right
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        left @ right
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)
