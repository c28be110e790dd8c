"""Local training without gradients: forward passes on both sides of a random step tell how far to go along it.

    for T steps:   z = a Gaussian direction (bases/gaussian.py), made anew whenever it is needed
                   w <- w + ε z      a = loss          central difference: both losses on the same batch
                   w <- w - 2 ε z    b = loss          g = (a - b) / 2 ε
                   w <- w + (ε - η g) z                back, and a step of η g against z, in one pass over the weights

The forward difference takes the loss at w and at w + ε z, so g = (a - b) / ε, and one pass less. MeZO (Malladi et al.,
NeurIPS 2023, arXiv 2305.17333, Algorithm 1). E[g z] is the gradient for small ε. A step along P directions takes their
differences from the same w, and moves by the mean of the g z.

Memory is inference's: weights change in place, tensor by tensor, and neither z nor a second copy is held. The price is
rounding: a step leaves each weight within two units in the last place of where exact arithmetic would. Dropout is off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedferret.bases.gaussian import add_directions_
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import Trained, TrainingRefused, endless, report_step
from fedferret.local.schedules import Schedule, check_warmup, factor

# adds factors_K[k] times direction columns[k] to weights, in place: a method may stretch directions
Move: TypeAlias = Callable[[Mapping[str, Tensor], Key, Sequence[int], Tensor], None]


@dataclass(frozen=True, kw_only=True)
class ZerothOrder:
    """How a client trains with forward passes alone. The defaults are FedKSeed's for a model of a billion weights."""

    learning_rate: float = 3e-7  # η; steps are √d times as long as a gradient's, so it is far below first-order rates
    schedule: Schedule = "constant"  # of η over the rounds; a server that walks the same way knows no client's steps
    warmup: float = 0.0  # share of the rounds in which η rises first
    perturbation: float = 5e-4  # ε, of every weight: small beside the weights, large beside their rounding
    steps: int = 200  # many, because each sees one direction
    batch_size: int = 1  # the papers': a step's noise is its direction's, hardly its batch's
    difference: Literal["central", "forward"] = "central"  # central is exact to ε²; forward to ε
    weight_decay: float = 0.0  # of tensors with two dimensions or more: not of biases and norms
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward passes; bf16 rounds weights about as coarsely as ε

    def __post_init__(self) -> None:
        for name in ("learning_rate", "perturbation", "steps", "batch_size"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: must be greater than 0")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay={self.weight_decay}: must not be negative")
        check_warmup(self.warmup)

    def check(self, model: nn.Module, name: str) -> None:
        """Forward passes fit any model.

        Args:
            model: prepared, on any device.
            name: the model's.
        """

    def factor(self, task: Task) -> float:
        """What the schedule multiplies η by.

        Args:
            task: says which round of how many is at hand.

        Returns:
            A factor above 0 and at most 1.
        """
        return factor(self.schedule, self.warmup, task.round - 1, task.rounds)

    def total_steps(self, num_examples: int) -> int:
        """How many steps a client takes in a round.

        Args:
            num_examples: that the client holds; has no influence.

        Returns:
            ``steps``.
        """
        return self.steps

    def total_batches(self, num_examples: int) -> int:
        """How many batches a client trains on in a round.

        Args:
            num_examples: that the client holds; has no influence.

        Returns:
            ``steps``: one batch per step; each batch costs two forward passes.
        """
        return self.steps

    def train(self, task: Task, data: Examples, key: Key) -> Trained:
        """Train ``task.model`` in place along fresh directions; raises what ``walk`` raises.

        With the central difference this is Algorithm 1 of MeZO.

        Args:
            task: the model and the loss.
            data: the client's examples.
            key: draws the order of the examples and the directions.

        Returns:
            The weights arrived at, the metrics of ``walk``, and no optimiser state.
        """
        _, metrics = self.walk(task, data, key, key.fold("directions"), range(self.steps))
        return Trained(tree.parameters(task.model), metrics)

    def walk(
        self,
        task: Task,
        data: Examples,
        key: Key,
        directions: Key,
        columns: Sequence[int],
        each: int = 1,
        move: Move = add_directions_,
    ) -> tuple[list[float], dict[str, float]]:
        """Train ``task.model`` in place, a step along each of some directions.

        Args:
            task: the model and the loss.
            data: the client's examples.
            key: draws the order of the examples, as in first-order training.
            directions: the key of the Gaussian directions.
            columns: which of the directions, in order.
            each: P, how many of the columns a step takes.
            move: adds directions to weights.

        Returns:
            The projected gradient g of every column, and the metrics: ``loss``, the mean over all steps, and
            ``seconds``.

        Raises:
            TrainingRefused: a client without examples, or a loss that is not finite.
        """
        if not len(data):
            raise TrainingRefused("the client holds no example")
        started = time.perf_counter()
        batches, rate = endless(data, self.batch_size, key), self.learning_rate * self.factor(task)
        weights, steps = tree.parameters(task.model), len(columns) // each
        losses: list[float] = []
        gradients: list[float] = []
        task.model.eval()  # dropout off
        with torch.no_grad():
            for step in range(steps):
                scored = partial(self._loss, task, next(batches), step)
                mine = columns[step * each : (step + 1) * each]
                loss, found = self._step(scored, partial(move, weights, directions), mine, rate)
                losses.append(loss)
                gradients += found
                for weight in weights.values() if self.weight_decay else ():
                    if weight.dim() > 1:
                        weight.mul_(1 - rate * self.weight_decay)
                report_step(step + 1, steps)
        return gradients, {"loss": math.fsum(losses) / len(losses), "seconds": time.perf_counter() - started}

    def _step(
        self,
        scored: Callable[[], float],
        move: Callable[[Sequence[int], Tensor], None],
        columns: Sequence[int],
        rate: float,
    ) -> tuple[float, list[float]]:
        """One step; the loss near w and the projected gradients."""
        central, epsilon = self.difference == "central", self.perturbation
        span, back = (2 * epsilon, epsilon) if central else (epsilon, -epsilon)
        loss = below = 0.0 if central else scored()
        gradients = []
        for number, column in enumerate(columns):
            move([column], torch.tensor([epsilon]))
            above = scored()
            if central:
                move([column], torch.tensor([-2 * epsilon]))
                below = scored()
                loss += (above + below) / 2 / len(columns)
            gradients.append((above - below) / span)
            if number < len(columns) - 1:
                move([column], torch.tensor([back]))
        factors = [-rate * gradient / len(columns) for gradient in gradients]
        factors[-1] = back + factors[-1]  # the last direction's way back and the step, at once
        move(columns, torch.tensor(factors))
        return loss, gradients

    def _loss(self, task: Task, batch: Any, step: int) -> float:
        with torch.autocast(task.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = task.objective.loss(task.model, batch).item()
        if not math.isfinite(loss):
            raise TrainingRefused(f"the loss is {loss} at step {step + 1}: lower the learning rate")
        return loss
