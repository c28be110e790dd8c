"""Training by forward passes: the steps it says, along the gradient on average, in the memory of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedferret.bases.gaussian import add_gaussian_
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.estimate import estimate
from fedferret.local.first_order import FirstOrder, TrainingRefused, endless, observing_steps
from fedferret.local.zeroth_order import ZerothOrder
from tiny_runs import tiny_recipe
from toys import Given, Rows, SquaredError, ToyData, toy_clients, toy_model, toy_task

DATA: Any = toy_clients()["b"]  # 12 rows
KEY, DIRECTIONS = Key.of(1, "train"), Key.of(1, "directions")
D = 97  # the toy model's weights
STILL = ZerothOrder(learning_rate=1e-12, perturbation=1e-3, batch_size=12)  # finds gradients and stays where it is


def flat(model: nn.Module) -> Tensor:
    """All weights end to end, copied."""
    return torch.cat([weight.reshape(-1) for weight in tree.parameters(model).values()])


def direction(column: int) -> Tensor:
    return add_gaussian_(torch.zeros(D), DIRECTIONS, column, 1.0)


def loss_at(weights_D: Tensor, rows: Rows) -> float:
    """In fp64, where a difference of losses is exact enough to compare with."""
    model = toy_model().double()
    nn.utils.vector_to_parameters(weights_D, model.parameters())
    return SquaredError().loss(model, Rows(rows.x.double(), rows.y.double())).item()


def gradient() -> Tensor:
    """Of the loss on all rows, fp64 (97,)."""
    model = toy_model().double()
    SquaredError().loss(model, Rows(DATA.x.double(), DATA.y.double())).backward()
    return torch.cat([weight.grad.reshape(-1) for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_walk_is_the_textbooks(difference: Any, weight_decay: float) -> None:
    """Steps of -η g z with g from two losses, and of -η λ w for matrices alone, written out in fp64."""
    training = ZerothOrder(
        learning_rate=0.01, perturbation=1e-2, batch_size=4, difference=difference, weight_decay=weight_decay
    )
    task, columns = toy_task(1), [5, 0, 9, 5, 2**31]
    gradients, metrics = training.walk(task, DATA, KEY, DIRECTIONS, columns)
    weights, losses = flat(toy_model()).double(), []
    matrices = torch.cat([torch.full((weight.numel(),), weight.dim() > 1) for weight in toy_model().parameters()])
    for column, rows, found in zip(columns, endless(DATA, 4, KEY), gradients, strict=False):
        z = direction(column).double()
        above = loss_at(weights + 1e-2 * z, rows)
        below = loss_at(weights - 1e-2 * z if difference == "central" else weights, rows)
        losses.append((above + below) / 2 if difference == "central" else below)
        expected = (above - below) / (2e-2 if difference == "central" else 1e-2)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
        weights -= 0.01 * expected * z
        weights *= 1 - 0.01 * weight_decay * matrices
    torch.testing.assert_close(flat(task.model).double(), weights, rtol=0, atol=2e-5)
    assert metrics["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5) and metrics["seconds"] > 0


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_there_and_back_returns_the_weights_to_two_units_in_the_last_place(difference: Any) -> None:
    """With a loss that never changes a step is +ε, -2ε, +ε (or +ε, -ε) alone."""
    task = Task.of(toy_model(), Given(lambda model, rows: torch.tensor(1.0)), 1)
    start = flat(task.model)
    for step in range(1, 30):
        training = ZerothOrder(perturbation=1e-3, steps=1, difference=difference)
        before = flat(task.model)
        training.train(task, DATA, Key.of(step))
        unit = torch.exp2(torch.frexp(before.abs() + 4e-3).exponent - 24.0)
        assert ((flat(task.model) - before).abs() <= 2 * unit).all()
    assert not torch.equal(flat(task.model), start)  # in place, so not exactly
    torch.testing.assert_close(flat(task.model), start, rtol=2e-6, atol=2e-8)


def test_the_mean_of_g_z_points_along_the_gradient() -> None:
    """cos = √(n / (n + d + 1)): along the gradient the mean is 1, and |z|² g² - 1 = d + 1 of noise falls as 1/n."""
    steps, times = 97, 12
    true = gradient()
    cosines = []
    for start in range(0, times * steps, steps):
        columns = range(start, start + steps)
        found, _ = STILL.walk(toy_task(1), DATA, KEY, DIRECTIONS, columns)
        mean = sum(g * direction(column).double() for g, column in zip(found, columns, strict=True)) / steps
        cosines.append(float(torch.cosine_similarity(mean, true, dim=0)))
        assert float(mean @ true) / float(true @ true) == pytest.approx(1, abs=5 * math.sqrt(2 / steps))
    mean_square = sum(cosine**2 for cosine in cosines) / times
    law = steps / (steps + D + 1)
    # in terms of the noise (d + 1) / n, which must be told from two thirds and three halves of itself
    noise, expected = 1 / mean_square - 1, 1 / law - 1
    assert 2 / 3 * expected < noise < 3 / 2 * expected


def test_central_differences_err_by_the_square_of_the_perturbation() -> None:
    """Halving ε quarters the central difference's error and halves the forward difference's."""
    true, errors = gradient(), {}
    for difference in ("central", "forward"):
        for perturbation in (0.2, 0.1):
            training = replace(STILL, perturbation=perturbation, difference=difference)  # type: ignore[arg-type]
            found, _ = training.walk(toy_task(1), DATA, KEY, DIRECTIONS, range(30))
            squares = [(g - float(direction(column).double() @ true)) ** 2 for column, g in enumerate(found)]
            errors[difference, perturbation] = math.sqrt(sum(squares))
    assert 3 < errors["central", 0.2] / errors["central", 0.1] < 5
    assert 1.7 < errors["forward", 0.2] / errors["forward", 0.1] < 2.7


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("native", ["0", "1"])
def test_nothing_of_the_models_size_is_made(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFERRET_NATIVE", native)
    model = nn.utils.skip_init(nn.Linear, 1000, 1000)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def mean_square(model: nn.Module, rows: Rows) -> Tensor:
        loss: Tensor = model(rows.x.expand(-1, 1000)).square().mean()
        assert not loss.requires_grad  # so no activation is kept
        return loss + 1

    data = ToyData(torch.ones(2, 1), torch.ones(2, 1))
    with Largest() as largest:
        ZerothOrder(steps=2, weight_decay=0.1).train(Task.of(model, Given(mean_square), 1), data, KEY)
    assert 0 < largest.elements < 100_000


def test_the_batches_are_those_of_first_order_training() -> None:
    read: list[list[float]] = []

    class Read(ToyData):
        def batches(self, size: int, key: Key) -> Iterator[Rows]:
            for rows in super().batches(size, key):
                read[-1].extend(rows.y.flatten().tolist())
                yield rows

    for training in (FirstOrder(steps=7, batch_size=4), ZerothOrder(steps=7, batch_size=4)):
        read.append([])
        training.train(toy_task(1), Read(DATA.x, DATA.y), KEY)  # type: ignore[attr-defined]
    assert read[0] == read[1]


def test_another_key_walks_along_other_directions() -> None:
    ends = []
    for key in (Key.of(1), Key.of(1), Key.of(2)):
        task = toy_task(1)
        ZerothOrder(learning_rate=0.01, steps=3, batch_size=12).train(task, DATA, key)
        ends.append(flat(task.model))
    assert torch.equal(ends[0], ends[1]) and not torch.allclose(ends[0], ends[2], atol=1e-3)


def test_an_observer_hears_of_every_step_and_dropout_is_off() -> None:
    heard: list[tuple[int, int]] = []
    task = Task.of(nn.Sequential(toy_model(), nn.Dropout(0.5)).train(), SquaredError(), 1)
    before = torch.get_rng_state()
    with observing_steps(lambda step, total: heard.append((step, total))):
        metrics = ZerothOrder(steps=3).train(task, DATA, KEY).metrics
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert metrics["loss"] == ZerothOrder(steps=3).train(toy_task(1), DATA, KEY).metrics["loss"]


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("bad", [1, 2, 3, 4])
def test_a_loss_that_is_not_finite_is_refused_at_its_step(difference: Any, bad: int) -> None:
    calls = iter(range(1, 9))

    def explodes(model: nn.Module, rows: Rows) -> Tensor:
        return SquaredError().loss(model, rows) * (torch.inf if next(calls) == bad else 1)

    with pytest.raises(TrainingRefused, match=f"the loss is inf at step {(bad + 1) // 2}: lower the learning rate"):
        ZerothOrder(steps=3, difference=difference).train(Task.of(toy_model(), Given(explodes), 1), DATA, KEY)


def test_an_empty_client_is_refused() -> None:
    with pytest.raises(TrainingRefused, match="the client holds no example"):
        ZerothOrder().train(toy_task(1), ToyData(DATA.x[:0], DATA.y[:0]), KEY)


def test_bf16_forward_passes_see_every_change_of_the_weights() -> None:
    """Autocast may keep rounded copies of the weights; one kept over a change would give a difference of nothing."""
    training = replace(STILL, perturbation=0.1)
    exact, _ = training.walk(toy_task(1), DATA, KEY, DIRECTIONS, range(10))
    coarse, _ = replace(training, precision="bf16").walk(toy_task(1), DATA, KEY, DIRECTIONS, range(10))
    assert coarse != exact
    for ours, theirs in zip(coarse, exact, strict=True):
        assert ours == pytest.approx(theirs, rel=0.2, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be greater than 0"),
        ({"perturbation": float("nan")}, "perturbation=nan: must be greater than 0"),
        ({"steps": 0}, "steps=0: must be greater than 0"),
        ({"batch_size": -1}, "batch_size=-1: must be greater than 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must not be negative"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ZerothOrder(**settings)


def test_an_estimate_counts_two_forward_passes_a_step_and_no_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedferret.estimate._rates", lambda rows, width: (0.0, 1.0))
    training = {"steps": 100_000, "batch_size": 4}  # beside which evaluation takes no time
    first, zeroth = (
        estimate(tiny_recipe(tmp_path, algorithm={"name": name, "training": training}))
        for name in ("fedavg", "fedmezo")
    )
    assert first.memory - zeroth.memory > 4 * first.parameters
    assert zeroth.seconds / first.seconds == pytest.approx(4 / 6, rel=1e-3)
