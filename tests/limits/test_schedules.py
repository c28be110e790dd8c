"""Where a learning rate's schedule becomes a sum, a curve of torch's, or nothing at all."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.staged_methods import TwoStages
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedkseed import FedKSeed
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from fedferret.local.zeroth_order import ZerothOrder
from toys import Given, SquaredError, simulate, toy_clients, toy_model, toy_task, weights

PLAIN = FirstOrder(learning_rate=0.01, steps=5, clip=None)
KEY = Key.of(3, "training")


def moved(algorithm: Any, rounds: int) -> Tensor:
    """How far each weight went where the gradient is 1 everywhere, in units of the learning rate times the steps."""
    slope = Given(lambda model, rows: sum(weight.sum() for weight in model.parameters()))  # type: ignore[arg-type, return-value]
    run = simulate(algorithm, rounds, task=Task.of(toy_model(), slope, rounds))
    before = tree.parameters(toy_model())
    gone = torch.cat([(before[name] - weight).flatten() for name, weight in weights(run).items()])
    return gone.double() / (PLAIN.learning_rate * PLAIN.total_steps(0))


def trained(training: FirstOrder, task: Task | None = None, **options: Any) -> dict[str, Tensor]:
    """The weights after one client's training, in round 2 of 3 where no task is given."""
    task = task or replace(toy_task(3), round=2)
    training.train(task, toy_clients()["a"], KEY, **options)
    return tree.clone(tree.parameters(task.model))


@pytest.mark.parametrize("over", ["rounds", "steps"])
def test_a_constant_schedule_is_no_schedule_to_the_bit(over: Any) -> None:
    whole = simulate(FedAvg(training=PLAIN), 3)
    assert simulate(FedAvg(training=replace(PLAIN, schedule_over=over, schedule="constant")), 3).memory == whole.memory
    assert simulate(FedAvg(training=replace(PLAIN, schedule_over=over, schedule="cosine")), 3).memory != whole.memory


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "linear"}, 1 + 0.75 + 0.5 + 0.25),
        ({"schedule": "cosine"}, 2.5),  # halves of 1 + cos(0), cos(π/4), cos(π/2), cos(3π/4)
        ({"schedule": "linear", "warmup": 0.5}, 1 / 3 + 2 / 3 + 1 + 0.5),
        ({"warmup": 0.25}, 0.5 + 1 + 1 + 1),
        ({"schedule": "linear", "schedule_over": "steps"}, 4 * 0.6),
    ],
)
def test_over_rounds_of_one_slope_weights_move_by_the_sum_of_the_factors(
    changes: dict[str, Any], expected: float
) -> None:
    found = moved(FedAvg(training=replace(PLAIN, **changes)), 4)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0, atol=2e-4)


def test_a_stages_schedule_runs_over_the_stages_own_rounds() -> None:
    linear = FedAvg(training=replace(PLAIN, schedule="linear"))
    found = moved(TwoStages(first=linear, second=linear, first_rounds=2), 6)
    torch.testing.assert_close(found, torch.full_like(found, 1.5 + 2.5), rtol=0, atol=2e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_over_steps_the_curve_is_torchs(optimizer: Any) -> None:
    training = FirstOrder(optimizer=optimizer, learning_rate=0.05, steps=7, weight_decay=0.1, clip=None)
    ours = trained(replace(training, schedule="cosine", schedule_over="steps"))
    model, batches = toy_model(), training._batches_by_step(toy_clients()["a"], KEY)
    theirs = training.optimizer_over(list(model.parameters()))
    curve = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=7)
    for (rows,), _ in zip(batches, range(7), strict=False):
        theirs.zero_grad()
        SquaredError().loss(model, rows).backward()  # type: ignore[no-untyped-call]
        theirs.step()
        curve.step()
    assert math.isclose(theirs.param_groups[0]["lr"], 0, abs_tol=1e-9)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("over", ["rounds", "steps"])
def test_a_scheduled_step_in_the_backward_pass_has_the_bits_of_one_after_it(over: Any) -> None:
    training = replace(PLAIN, schedule="cosine", schedule_over=over, warmup=0.3)
    within, after = trained(training), trained(training, adjust=lambda parameters: None)
    assert all(torch.equal(weight, after[name]) for name, weight in within.items())


def test_a_seeds_server_steps_at_the_rate_of_its_clients_walk() -> None:
    """In the second round of a falling schedule, one client's own walk and the server's model are one."""
    walk = ZerothOrder(learning_rate=0.005, perturbation=1e-3, steps=20, batch_size=4, schedule="linear")
    method, only = FedKSeed(pool_size=64, training=walk), toy_clients(1)
    run, one = simulate(method, 2, data=only), simulate(method, 2, data=only, until=1)
    node = one.state.node
    node.algorithm.client_update(node.task, one.state.public, None, only["a"], Key.of(3, "local", 2, "a"))
    for name, weight in tree.parameters(one.task.model).items():
        torch.testing.assert_close(weights(run)[name], weight, rtol=0, atol=5e-6)
    flat = replace(method, training=replace(walk, schedule="constant"))
    assert weights(simulate(flat, 2, data=only, until=1))["0.weight"].equal(weights(one)["0.weight"])
    assert not torch.allclose(weights(simulate(flat, 2, data=only))["0.weight"], weights(run)["0.weight"], atol=1e-3)


def test_a_warmup_that_never_ends_is_refused() -> None:
    for kind in (FirstOrder, ZerothOrder):
        with pytest.raises(UserError, match=r"warmup=1\.0: give a share"):
            kind(warmup=1.0)
