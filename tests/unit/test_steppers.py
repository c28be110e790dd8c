"""Two ways to step, one result: gradients used as they come, and gradients collected first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedferret import models
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.data.batches import Batch
from fedferret.local.first_order import FirstOrder
from fedferret.local.steppers import StepAfterBackward
from fedferret.objectives.next_token import NextToken


class Sentences:
    """Random tokens of which the second half is scored."""

    def __init__(self, count: int = 12, length: int = 24) -> None:
        self.ids = (Key.of(3, "sentences").uniform(count * length) * 250).long().view(count, length)

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, key: Key) -> Iterator[Any]:
        order = key.permutation(len(self.ids))
        for start in range(0, len(order), size):
            ids = self.ids[order[start : start + size]]
            labels = ids.clone()
            labels[:, : ids.shape[1] // 2] = -100
            yield Batch(ids, torch.ones_like(ids), labels)


def trained(**settings: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tiny model's weights (its embedding is tied) after some steps, and what training said."""
    model = models.load("tiny").model
    task = Task.of(model, NextToken(), 1)
    said = FirstOrder(learning_rate=0.05, steps=4, **settings).train(task, Sentences(), Key.of(1)).metrics
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, said


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name


def test_gradients_applied_as_they_come_give_the_bits_of_gradients_collected_first(monkeypatch: Any) -> None:
    at_once, said = trained(clip=None)

    def collected(self: FirstOrder, weights: dict[str, nn.Parameter], *others: Any) -> Any:
        return StepAfterBackward(weights, torch.optim.SGD(weights.values(), 0.05), None)

    monkeypatch.setattr(FirstOrder, "_stepper", collected)
    afterwards, said_again = trained(clip=None)
    assert_same_bits(at_once, afterwards)
    assert said["loss"] == said_again["loss"]


def test_gradients_applied_as_they_come_leave_no_gradient_and_no_hook() -> None:
    model = models.load("tiny").model
    task = Task.of(model, NextToken(), 1)
    FirstOrder(clip=None, steps=1).train(task, Sentences(), Key.of(1))
    assert all(weight.grad is None for weight in model.parameters())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    task.objective.loss(model, next(Sentences().batches(4, Key.of(2)))).backward()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_recomputed_activations_give_the_same_bits() -> None:
    kept, said = trained()
    recomputed, said_again = trained(checkpoint_activations=True)
    assert_same_bits(kept, recomputed)
    assert said["loss"] == said_again["loss"]


def test_bf16_compute_keeps_fp32_weights_and_changes_the_numbers_a_little() -> None:
    full, said = trained()
    half, said_half = trained(precision="bf16")
    assert all(weight.dtype == torch.float32 for weight in half.values())
    assert said["loss"] != said_half["loss"]
    assert abs(said["loss"] - said_half["loss"]) < 0.05
    assert any(not torch.equal(weight, half[name]) for name, weight in full.items())
