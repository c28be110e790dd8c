"""Local training: as PyTorch's own optimisers would, in steps or epochs, leaving nothing behind."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

from fedferret.core.algorithm import Task
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import FirstOrder, TrainingRefused, endless, observing_steps
from toys import Failing, Rows, ToyData, squared_error, toy_clients, toy_model, toy_task

DATA: Any = toy_clients()["b"]  # 12 rows
KEY = Key.of(1, "train")


def by_hand(optimizer: Any, settings: FirstOrder, steps: int, **options: Any) -> nn.Module:
    """The same steps, written out."""
    model = toy_model()
    steppers = optimizer(model.parameters(), lr=settings.learning_rate, **options)
    batches = endless(DATA, settings.batch_size, KEY)
    for _ in range(steps):
        for batch in islice(batches, settings.accumulate):
            (squared_error(model, batch) / settings.accumulate).backward()
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        steppers.step()
        steppers.zero_grad()
    return model


@pytest.mark.parametrize(
    ("settings", "optimizer", "steps", "options"),
    [
        ({"steps": 4}, torch.optim.SGD, 4, {}),
        ({"steps": 4, "clip": None}, torch.optim.SGD, 4, {}),  # no gradient buffer
        ({"steps": 4, "clip": 0.1}, torch.optim.SGD, 4, {}),
        ({"steps": 3, "accumulate": 2, "clip": None}, torch.optim.SGD, 3, {}),
        ({"steps": 4, "momentum": 0.9}, torch.optim.SGD, 4, {"momentum": 0.9}),
        ({"steps": 4, "weight_decay": 0.1, "clip": None}, torch.optim.SGD, 4, {"weight_decay": 0.1}),
        ({"steps": 4, "optimizer": "adamw"}, torch.optim.AdamW, 4, {"weight_decay": 0.0}),
        ({"steps": 4, "optimizer": "adamw", "weight_decay": 0.1}, torch.optim.AdamW, 4, {"weight_decay": 0.1}),
        ({"epochs": 2}, torch.optim.SGD, 6, {}),
        ({"epochs": 1, "accumulate": 2}, torch.optim.SGD, 2, {}),
        ({}, torch.optim.SGD, 5, {}),
    ],
)
def test_training_is_the_plain_loop(settings: dict[str, Any], optimizer: Any, steps: int, options: Any) -> None:
    training, task = FirstOrder(learning_rate=0.05, **settings), toy_task(1)
    metrics = training.train(task, DATA, KEY)
    expected = by_hand(optimizer, training, steps, **options)
    for ours, theirs in zip(task.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert metrics["loss"] > 0 and metrics["seconds"] > 0
    assert training.total_steps(len(DATA)) == steps


def test_a_pull_of_mu_times_the_distance_joins_the_gradient() -> None:
    task, anchor = toy_task(1), {name: weight.detach() + 1 for name, weight in toy_model().named_parameters()}
    training = FirstOrder(learning_rate=0.05, steps=1, clip=None)
    training.train(task, DATA, KEY, anchor=anchor, proximal=0.3)
    free = by_hand(torch.optim.SGD, training, 1)
    for ours, theirs in zip(task.model.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs + 0.05 * 0.3, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_training_that_fails_leaves_nothing_for_the_next(clip: float | None) -> None:
    training, task = FirstOrder(learning_rate=0.05, steps=3, accumulate=2, clip=clip), toy_task(1)
    with pytest.raises(OSError, match="the disk is gone"):
        training.train(task, Failing(DATA.x, DATA.y), KEY)
    assert all(weight.grad is None for weight in task.model.parameters())
    task.model.load_state_dict(toy_model().state_dict())
    training.train(task, DATA, KEY)
    clean = toy_task(1)
    training.train(clean, DATA, KEY)
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), clean.model.parameters(), strict=True))


def test_dropout_draws_nothing_from_the_global_generator() -> None:
    model = nn.Sequential(toy_model(), nn.Dropout(0.5))
    before = torch.get_rng_state()
    losses = [FirstOrder(steps=3).train(Task(model, squared_error, 1), DATA, KEY)["loss"] for _ in range(1)]
    plain = toy_model()
    assert losses == [FirstOrder(steps=3).train(Task(plain, squared_error, 1), DATA, KEY)["loss"]]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_observer_hears_of_every_step_and_changes_nothing() -> None:
    heard: list[tuple[int, int]] = []
    task, silent = toy_task(1), toy_task(1)
    with observing_steps(lambda step, total: heard.append((step, total))):
        FirstOrder(steps=3).train(task, DATA, KEY)
    FirstOrder(steps=3).train(silent, DATA, KEY)
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), silent.model.parameters(), strict=True))


def test_every_row_comes_once_an_epoch_in_another_order_each_time() -> None:
    batches = endless(DATA, 4, KEY)
    epochs = [torch.cat([batch.x for batch in islice(batches, 3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == sorted(DATA.x[:, 0].tolist())
    assert not torch.equal(*epochs)


def test_an_empty_client_and_a_broken_loss_are_refused() -> None:
    with pytest.raises(TrainingRefused, match="the client holds no example"):
        FirstOrder().train(toy_task(1), ToyData(DATA.x[:0], DATA.y[:0]), KEY)

    def explodes(model: nn.Module, rows: Rows) -> torch.Tensor:
        return squared_error(model, rows) * torch.inf

    with pytest.raises(TrainingRefused, match="the loss is inf at step 1: lower the learning rate"):
        FirstOrder(steps=2).train(Task(toy_model(), explodes, 1), DATA, KEY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2, "epochs": 1}, "steps=2, epochs=1: give one of the two"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be greater than 0"),
        ({"batch_size": 0}, "batch_size=0: must be greater than 0"),
        ({"clip": -1.0}, "clip=-1.0: must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be greater than 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must not be negative"),
        ({"optimizer": "adamw", "momentum": 0.9}, "momentum is SGD's"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FirstOrder(**settings)
