"""Local training with gradients: SGD or AdamW over a client's examples.

    for T steps, or epochs:   rate = learning_rate × the schedule's factor, of the step or of the round
                              gradient of the mean loss, over ``accumulate`` batches
                              adjust(parameters): proximal terms, masks, control variates      clip the global norm
                              one step of the optimiser, fresh each round unless its state is handed in

An epoch is one pass over the client's examples, whatever ``accumulate`` is: the last step of a pass takes the batches
that are left. Weights are fp32 whatever the compute precision, or, in a model held in bf16, fp32 sums that the model's
weights are rounded from (``masters.py``). Plain SGD (no momentum, decay, clip, accumulation or
adjustment) needs no gradient buffer: each tensor's gradient is applied and dropped as the backward pass produces it,
same bits. Dropout is off: it would draw from the global generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.masters import Masters
from fedferret.local.recomputing import check_recomputing, recomputed
from fedferret.local.schedules import Schedule, check_warmup, factor
from fedferret.local.steppers import Adjust, OptimizerState, StepAfterBackward, StepInBackward, Stepper

MOST_STEPS = 2**31  # of one client in one round: no claim reaches it


class TrainingRefused(RuntimeError):
    """A client's training that went wrong: no examples, or a loss that is NaN or infinite."""


@dataclass(frozen=True)
class Trained:
    """What a client's training gives.

    Attributes:
        weights: that training arrived at, by name, fp32: the model's own, not copied; of a bf16 model the masters that
            hold the unrounded sums of all steps.
        metrics: ``loss``, the mean over all steps, and ``seconds``.
        state: of the optimiser, where one was handed in.
    """

    weights: Mapping[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)
    state: OptimizerState | None = None


StepObserver = Callable[[int, int], None]  # (step, of how many)
_observer: ContextVar[StepObserver | None] = ContextVar("step_observer", default=None)


@contextmanager
def observing_steps(observer: StepObserver) -> Iterator[None]:
    """Observe local steps: live progress without touching a method.

    Args:
        observer: called after every step with the step, from 1, and the number of steps of the training.

    Returns:
        A context manager; after it the observer of before is back.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def report_step(step: int, total: int) -> None:
    """Call this context's observer, if there is one, after a local step.

    Args:
        step: the step that has ended, from 1.
        total: steps of the training.
    """
    if observer := _observer.get():
        observer(step, total)


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """How a client trains. Either ``steps`` or ``epochs`` counts the work."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 1e-2
    schedule: Schedule = "constant"  # of the learning rate
    schedule_over: Literal["rounds", "steps"] = (
        "rounds"  # the run's or the stage's rounds, or a client's own in a round
    )
    warmup: float = 0.0  # share of these rounds or steps in which the rate rises first
    momentum: float = 0.0  # SGD's
    weight_decay: float = 0.0
    clip: float | None = 1.0  # of the gradient's global norm; None ("none" in TOML) is off
    batch_size: int = 4
    accumulate: int = 1  # batches per step
    steps: int | None = None  # 5 where neither is given
    epochs: int | None = None  # passes over the client's examples
    precision: Literal["fp32", "bf16"] = "fp32"  # of compute; bf16 is autocast over fp32 weights and changes numbers
    checkpoint_activations: bool = False  # a third more compute for much less memory with long or many examples

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", 5)
        if self.steps is not None and self.epochs is not None:
            raise UserError(f"steps={self.steps}, epochs={self.epochs}: give one of the two")
        for name in ("learning_rate", "batch_size", "accumulate", "steps", "epochs", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value}: must be greater than 0")
        for name in ("momentum", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must not be negative")
        check_warmup(self.warmup)
        if self.momentum >= 1:
            raise UserError(f"momentum={self.momentum}: must be below 1, or steps grow without end")
        if self.optimizer == "adamw" and self.momentum:
            raise UserError(f"momentum={self.momentum} with adamw: momentum is SGD's; remove it or choose sgd")

    def check(self, model: nn.Module, name: str) -> None:
        """Refuse settings that a model cannot be trained with, before any work.

        Args:
            model: prepared, on any device, the meta device included.
            name: the model's, for errors.

        Raises:
            UserError: names the setting.
        """
        if self.checkpoint_activations:
            check_recomputing(model, name)

    def rate(self, task: Task, step: int, steps: int) -> float:
        """The learning rate of a step.

        Args:
            task: says which round of how many is at hand.
            step: of this round, from 0.
            steps: of this client in this round.

        Returns:
            ``learning_rate``, times the schedule's factor.
        """
        number, count = (step, steps) if self.schedule_over == "steps" else (task.round - 1, task.rounds)
        return self.learning_rate * factor(self.schedule, self.warmup, number, count)

    def total_steps(self, num_examples: int) -> int:
        """How many optimiser steps a client takes in a round.

        Args:
            num_examples: that the client holds.

        Returns:
            ``steps``, or the steps of ``epochs`` passes; the last step of a pass may have fewer batches.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * math.ceil(self.batches_per_pass(num_examples) / self.accumulate)

    def may_take(self, steps: object) -> bool:
        """Whether some number of examples gives a client so many steps in a round.

        Args:
            steps: as a client states it, of any type.

        Returns:
            True for ``steps``, or for a multiple of ``epochs`` below ``MOST_STEPS``.
        """
        if type(steps) is not int:
            return False
        if self.epochs is None:
            return steps == self.steps
        return self.epochs <= steps < MOST_STEPS and steps % self.epochs == 0

    def total_batches(self, num_examples: int) -> int:
        """How many batches a client trains on in a round.

        Args:
            num_examples: that the client holds.

        Returns:
            ``accumulate`` per step, or the batches of ``epochs`` passes.
        """
        if self.steps is not None:
            return self.steps * self.accumulate
        assert self.epochs is not None
        return self.epochs * self.batches_per_pass(num_examples)

    def batches_per_pass(self, num_examples: int) -> int:
        """How many batches one pass over a client's examples has.

        Args:
            num_examples: that the client holds.

        Returns:
            ``num_examples`` / ``batch_size``, rounded up: one batch may be smaller.
        """
        return math.ceil(num_examples / self.batch_size)

    def train(
        self,
        task: Task,
        data: Examples,
        key: Key,
        *,
        adjust: Adjust | None = None,
        mask: Mapping[str, Tensor] | None = None,
        state: OptimizerState | None = None,
    ) -> Trained:
        """Train ``task.model`` in place.

        Args:
            task: the model and the loss.
            data: the client's examples.
            key: draws the order of the examples.
            adjust: called with the trained parameters by name between backward and step; may change their ``grad``.
            mask: by parameter, 1 where values train and 0 where they stay, bit for bit: gradient, weight decay and
                moments are gated. Parameters that are not named train whole.
            state: of the optimiser to go on with; a new ``OptimizerState()`` for the first time. None: a fresh
                optimiser, and no state comes back.

        Returns:
            The weights arrived at, metrics, and the optimiser's state if one was handed in.

        Raises:
            TrainingRefused: a client without examples, or a loss that is not finite.
        """
        if not len(data):
            raise TrainingRefused("the client holds no example")
        started = time.perf_counter()
        masters = Masters(task.model, key.fold("rounding"))
        total = self.total_steps(len(data))
        losses = torch.zeros(total, device=task.device)  # read once at the end: no synchronisation in the loop
        stepper = masters.stepper(self._stepper(masters.weights, adjust, mask, state))
        with stepper, recomputed(task.model, self.checkpoint_activations):
            for step, batches in enumerate(islice(self._batches_by_step(data, key), total)):
                stepper.use_rate(self.rate(task, step, total))
                for batch in batches:
                    with torch.autocast(task.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                        loss = task.objective.loss(task.model, batch) / len(batches)
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses[step] += loss.detach()
                stepper.step()
                report_step(step + 1, total)
            kept = stepper.state() if state is not None else None
        mean_loss = losses.mean().item()
        if not math.isfinite(mean_loss):
            step = int(torch.nonzero(~torch.isfinite(losses))[0])
            raise TrainingRefused(f"the loss is {losses[step].item()} at step {step + 1}: lower the learning rate")
        metrics = {"loss": mean_loss, "seconds": time.perf_counter() - started}
        return Trained(masters.detached(), metrics, kept)

    def _batches_by_step(self, data: Examples, key: Key) -> Iterator[list[Any]]:
        """The batches of every step. In epochs a pass's last step takes what is left of the pass."""
        if self.steps is not None:
            batches = endless(data, self.batch_size, key)
            while True:
                yield list(islice(batches, self.accumulate))
        for batches in _passes(data, self.batch_size, key):
            while group := list(islice(batches, self.accumulate)):
                yield group

    def _stepper(
        self,
        weights: Mapping[str, nn.Parameter],
        adjust: Adjust | None,
        mask: Mapping[str, Tensor] | None,
        state: OptimizerState | None,
    ) -> Stepper:
        plain = self.optimizer == "sgd" and not self.momentum and not self.weight_decay
        if plain and self.clip is None and self.accumulate == 1 and adjust is None and mask is None and state is None:
            return StepInBackward(list(weights.values()), self.learning_rate)
        return StepAfterBackward(weights, self._optimizer(list(weights.values())), self.clip, adjust, mask, state)

    def _optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(weights, self.learning_rate, self.momentum, weight_decay=self.weight_decay)
        return torch.optim.AdamW(weights, self.learning_rate, weight_decay=self.weight_decay)


def endless(data: Examples, size: int, key: Key) -> Iterator[Any]:
    """Pass after pass over a client's examples, each in an order drawn anew.

    Args:
        data: a client's examples, at least one: without any, the first batch never comes.
        size: examples of a batch, at most.
        key: draws the orders.

    Returns:
        Batches without end; no batch spans two passes.
    """
    return chain.from_iterable(_passes(data, size, key))


def _passes(data: Examples, size: int, key: Key) -> Iterator[Iterator[Any]]:
    """The batches of each pass, without end."""
    for epoch in count():
        yield iter(data.batches(size, key.fold("epoch", epoch)))
