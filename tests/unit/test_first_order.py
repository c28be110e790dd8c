"""Local training: as PyTorch's own optimisers would, in steps or epochs, leaving nothing behind."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedferret.algorithms.fedprox import pull
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder, TrainingRefused, endless, observing_steps
from fedferret.local.steppers import OptimizerState
from fedferret.wire import codec
from toys import Failing, SquaredError, ToyData, toy_clients, toy_model, toy_task

DATA: Any = toy_clients()["b"]  # 12 rows
KEY = Key.of(1, "train")


def by_hand(optimizer: Any, settings: FirstOrder, steps: int, **options: Any) -> nn.Module:
    """The same steps, written out."""
    model = toy_model()
    steppers = optimizer(model.parameters(), lr=settings.learning_rate, **options)
    endlessly = endless(DATA, settings.batch_size, KEY)
    for step in range(steps):
        left = settings.accumulate
        if settings.epochs is not None:  # a pass's last step takes what is left of the pass
            per_pass = -(-settings.batches_per_pass(len(DATA)) // settings.accumulate)
            left = min(left, settings.batches_per_pass(len(DATA)) - step % per_pass * settings.accumulate)
        for batch in islice(endlessly, left):
            (SquaredError().loss(model, batch) / left).backward()
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
    metrics = training.train(task, DATA, KEY).metrics
    expected = by_hand(optimizer, training, steps, **options)
    for ours, theirs in zip(task.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert metrics["loss"] > 0 and metrics["seconds"] > 0
    assert training.total_steps(len(DATA)) == steps


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 20), batch=st.integers(1, 9), accumulate=st.integers(1, 9), epochs=st.integers(1, 4))
def test_epochs_are_passes_whatever_is_accumulated(rows: int, batch: int, accumulate: int, epochs: int) -> None:
    class Counted(ToyData):
        seen = 0

        def batches(self, size: int, key: Any) -> Any:
            for each in super().batches(size, key):
                Counted.seen += len(each.x)
                yield each

    data = Counted(DATA.x[:1].repeat(rows, 1), DATA.y[:1].repeat(rows, 1))
    training = FirstOrder(epochs=epochs, batch_size=batch, accumulate=accumulate)
    training.train(toy_task(1), data, KEY)
    assert Counted.seen == epochs * rows
    assert training.total_batches(rows) == epochs * math.ceil(rows / batch)
    assert training.total_steps(rows) == epochs * math.ceil(math.ceil(rows / batch) / accumulate)


def test_a_mask_leaves_masked_values_bit_identical() -> None:
    """Whatever the optimiser, its decay, its clip and the moments that it was handed."""
    for options in (
        {"optimizer": "adamw", "weight_decay": 0.3},
        {"momentum": 0.9, "weight_decay": 0.3},
        {"optimizer": "adamw", "clip": None, "accumulate": 2},
        {"clip": None},
    ):
        training = FirstOrder(learning_rate=0.1, steps=3, **options)  # type: ignore[arg-type]
        task, start = toy_task(1), {name: w.detach().clone() for name, w in toy_model().named_parameters()}
        moments = training.train(task, DATA, KEY, state=OptimizerState()).state
        task = toy_task(1)
        mask = {name: (Key.of(2).fold(name).uniform(w.numel()) < 0.5).float().view_as(w) for name, w in start.items()}
        training.train(task, DATA, KEY, mask=mask, state=moments)
        for name, weight in task.model.named_parameters():
            kept = mask[name] == 0
            assert torch.equal(weight.detach()[kept], start[name][kept])
            assert not torch.equal(weight.detach()[~kept], start[name][~kept])


@pytest.mark.parametrize(
    "options", [{"optimizer": "adamw", "weight_decay": 0.2}, {"momentum": 0.9, "weight_decay": 0.2}]
)
def test_a_mask_of_ones_and_a_state_that_is_new_change_nothing(options: dict[str, Any]) -> None:
    training = FirstOrder(learning_rate=0.05, steps=4, **options)
    plain, masked = toy_task(1), toy_task(1)
    training.train(plain, DATA, KEY)
    ones = {name: torch.ones_like(w) for name, w in toy_model().named_parameters()}
    trained = training.train(masked, DATA, KEY, mask=ones, state=OptimizerState())
    assert trained.state is not None and set(trained.state.parts) == set(ones)
    for ours, theirs in zip(masked.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"momentum": 0.9}])
def test_two_trainings_with_the_state_carried_over_are_one(options: dict[str, Any]) -> None:
    """On a fixed order of rows; the state survives the codec on its way."""
    data = ToyData(DATA.x, DATA.y, shuffled=False)
    whole, halves = toy_task(1), toy_task(1)
    FirstOrder(learning_rate=0.05, steps=6, **options).train(whole, data, KEY)
    half = FirstOrder(learning_rate=0.05, steps=3, **options)  # three steps are one pass
    state = half.train(halves, data, KEY, state=OptimizerState()).state
    half.train(halves, data, KEY, state=codec.decode(codec.encode(state)))
    for ours, theirs in zip(halves.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_pull_of_mu_times_the_distance_joins_the_gradient() -> None:
    task, anchor = toy_task(1), {name: weight.detach() + 1 for name, weight in toy_model().named_parameters()}
    training = FirstOrder(learning_rate=0.05, steps=1, clip=None)
    training.train(task, DATA, KEY, adjust=pull(anchor, 0.3))
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
    losses = [FirstOrder(steps=3).train(Task.of(model, SquaredError(), 1), DATA, KEY).metrics["loss"] for _ in range(1)]
    plain = toy_model()
    assert losses == [FirstOrder(steps=3).train(Task.of(plain, SquaredError(), 1), DATA, KEY).metrics["loss"]]
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

    with pytest.raises(TrainingRefused, match="the loss is inf at step 1: lower the learning rate"):
        FirstOrder(steps=2).train(Task.of(toy_model(), SquaredError(torch.inf), 1), DATA, KEY)


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
        ({"momentum": 1.0}, "must be below 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FirstOrder(**settings)
