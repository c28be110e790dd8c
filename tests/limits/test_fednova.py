"""FedNova: FedAvg where all take as many steps; where they do not, clients count by their examples alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fednova import MOST, FedNova, NormalizedDelta
from fedferret.algorithms.fedprox import FedProx
from fedferret.core.algorithm import Pooled
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from toys import TRAINING, Rows, SquaredError, ToyData, simulate, toy_clients, toy_task, weights

ONE_PASS = FirstOrder(learning_rate=0.05, epochs=1, batch_size=2, clip=None)


def test_with_equal_steps_it_is_fedavg_or_fedprox_to_the_bit() -> None:
    assert simulate(FedNova(training=TRAINING), 3).public == simulate(FedAvg(training=TRAINING), 3).public
    assert (
        simulate(FedNova(mu=0.1, training=TRAINING), 3).public == simulate(FedProx(mu=0.1, training=TRAINING), 3).public
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_as_many_examples_it_is_fedavg_and_with_more_or_fewer_it_is_not(momentum: float) -> None:
    training = replace(ONE_PASS, learning_rate=0.01, momentum=momentum)
    rows: Any = toy_clients()
    same = {client: data.take(range(9)) for client, data in rows.items()}
    ours, theirs = FedNova(training=training), FedAvg(training=training)
    for name, weight in weights(simulate(ours, 2, data=same)).items():
        torch.testing.assert_close(weights(simulate(theirs, 2, data=same))[name], weight, rtol=1e-5, atol=1e-6)
    assert simulate(ours, 1).public != simulate(theirs, 1).public


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.8, 0.0), (0.0, 2.0)])
def test_the_length_is_how_far_unit_gradients_lead_and_the_papers_closed_form(momentum: float, mu: float) -> None:
    """A loss with gradient 1 everywhere, local training itself, and the norms of a in the paper's section 4."""

    class Slope(SquaredError):
        def loss(self, model: nn.Module, rows: Rows) -> torch.Tensor:
            return next(model.parameters()).sum()

    model, tau, rate = nn.Linear(1, 1, bias=False), 7, 0.05
    task = Task.of(model, Slope(), 1)
    nova = FedNova(mu=mu, training=replace(ONE_PASS, momentum=momentum, batch_size=1))
    public, _ = nova.init(task, Key.of(1))
    data = ToyData(torch.ones(tau, 1), torch.ones(tau, 1))
    reply = nova.client_update(task, public, None, data, Key.of(1))
    alpha = rate * mu
    expected = (
        (1 - (1 - alpha) ** tau) / alpha
        if mu
        else (tau - momentum * (1 - momentum**tau) / (1 - momentum)) / (1 - momentum)
    )
    assert nova.length(task, tau) == pytest.approx(expected, rel=1e-12)
    assert float(reply.payload.lengths[0]) == pytest.approx(expected)
    assert float(reply.payload.delta["weight"]) == pytest.approx(rate, rel=1e-5)


def test_clients_count_by_their_examples_where_fedavg_counts_their_steps_too() -> None:
    """Parabolas around -1 and 1 with equal weights: the optimum is 0, whoever takes 16 times the steps."""
    model = nn.Linear(1, 1, bias=False)
    data = {"a": ToyData(torch.ones(1, 1), -torch.ones(1, 1)), "b": ToyData(torch.ones(16, 1), torch.ones(16, 1))}
    training = FirstOrder(learning_rate=0.02, epochs=1, batch_size=1, clip=None)
    found = {}
    for algorithm in (FedNova(weighting="equal", training=training), FedAvg(weighting="equal", training=training)):
        nn.init.zeros_(model.weight)
        run = simulate(algorithm, 25, data=data, task=Task.of(model, SquaredError(), 25))
        found[algorithm.name] = float(run.state.public.weights["weight"])
    assert abs(found["fednova"]) < 0.2 and found["fedavg"] > 0.7


def test_no_claim_of_steps_scales_everybodys_update_without_bound() -> None:
    nova = FedNova(training=ONE_PASS)
    task = toy_task(1)
    public, _ = nova.init(task, Key.of(1))
    zeros = {name: torch.zeros_like(weight) for name, weight in public.weights.items()}
    lengths = torch.tensor([2.0**30, 2.0**-30])
    nova.accept(task, public, NormalizedDelta(zeros, lengths))
    ones = {name: torch.ones_like(weight) for name, weight in public.weights.items()}
    mean = NormalizedDelta(ones, (9 * torch.tensor([4.0, 0.25]) + lengths) / 10)
    _, entry = nova.server_update(task, public, None, Pooled((mean,), (1.0,) * 10), Key.of(1))
    assert float(entry.delta["0.bias"][0]) == pytest.approx(MOST * 4 / 0.9)
    for wrong in ([0.5, 2.0], [-1.0, -1.0], [4.0, 0.2], [2.0**33, 2.0**-33], [float("nan")] * 2):
        with pytest.raises(ValueError, match="which these settings do not give"):
            nova.accept(task, public, NormalizedDelta(zeros, torch.tensor(wrong)))


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({}, {"optimizer": "adamw"}, 'optimizer="adamw": its steps are no sum of gradients'),
        ({}, {"schedule_over": "steps"}, 'schedule_over="steps": steps count alike'),
        ({"mu": 0.1}, {"momentum": 0.9}, "mu=0.1, training.momentum=0.9: choose one"),
        ({"mu": 20.0}, {}, "mu=20.0: times the learning rate it must be below 1"),
        ({"mu": -1.0}, {}, "mu=-1.0: must not be negative"),
    ],
)
def test_steps_that_have_no_length_are_refused(settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FedNova(**settings, training=replace(ONE_PASS, **changes))
