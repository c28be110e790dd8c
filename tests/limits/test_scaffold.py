"""SCAFFOLD: FedAvg where controls say nothing, and the optimum of all clients where FedAvg stops beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.scaffold import Scaffold
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.robust_pooling import PoolSettings
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from toys import INPUTS, TRAINING, SquaredError, ToyData, bits, normal, simulate, toy_clients

FEDAVG, SCAFFOLD = FedAvg(weighting="equal", training=TRAINING), Scaffold(training=TRAINING)


def test_with_one_client_and_in_the_first_round_it_is_fedavg_to_the_bit() -> None:
    for rounds, data in ((1, toy_clients()), (4, toy_clients(1))):
        ours, theirs = simulate(SCAFFOLD, rounds, data=data), simulate(FEDAVG, rounds, data=data)
        assert bits(ours.state.public.weights) == bits(theirs.state.public.weights)
    assert bits(ours.state.public.control) == bits(ours.store.get("a").control)
    assert ours.public != simulate(SCAFFOLD, 4).public


def opposed(count: int = 4) -> dict[str, ToyData]:
    """Clients with rows mostly along one direction each, and laws that contradict each other."""
    data = {}
    for number in range(count):
        key = Key.of(5, "opposed", number)
        x = normal(key.fold("x"), 12, INPUTS) * torch.tensor([0.3 + 0.7 * (each == number) for each in range(INPUTS)])
        data[chr(ord("a") + number)] = ToyData(x, x @ (3 * normal(key.fold("law"), INPUTS, 1)), shuffled=False)
    return data


def optimum(data: dict[str, ToyData]) -> torch.Tensor:
    """The least squares of all clients, each counted once."""
    x = torch.cat([rows.x for rows in data.values()]).double()
    return torch.linalg.lstsq(x, torch.cat([rows.y for rows in data.values()]).double()).solution.flatten()


def distance(algorithm: FedAvg, per_round: int, rounds: int) -> float:
    """From the optimum, after some rounds of many local steps of whole batches."""
    data, model = opposed(), nn.Linear(INPUTS, 1, bias=False)
    nn.init.zeros_(model.weight)
    task = Task.of(model, SquaredError(), rounds)
    pool = PoolSettings(norm_limit="off")  # the weights begin at 0
    run = simulate(algorithm, rounds, data=data, per_round=per_round, task=task, pool=pool)
    found = tree.clone(run.state.public.weights)["weight"].double().flatten()
    return float((found - optimum(data)).norm() / optimum(data).norm())


@pytest.mark.parametrize("per_round", [4, 2])
def test_it_reaches_the_optimum_of_all_clients_where_fedavg_stops_beside_it(per_round: int) -> None:
    training = FirstOrder(learning_rate=0.5, steps=4, batch_size=12, clip=None)
    fedavg = distance(replace(FEDAVG, training=training), per_round, 25)
    assert fedavg > 0.15
    assert distance(replace(SCAFFOLD, training=training), per_round, 25) < 0.02 * fedavg


def test_the_control_is_the_mean_of_the_controls_of_all_who_have_replied() -> None:
    """A client that is new has everybody's, so that its first steps are FedAvg's."""
    run = simulate(SCAFFOLD, 3, data=toy_clients(7), per_round=2)
    known = [run.store.get(client) for client in run.data if run.store.get(client) is not None]
    assert [client for client in run.data if run.store.get(client)] == list(run.state.server.clients)
    assert 2 < len(known) < 7
    for name, control in run.state.public.control.items():
        torch.testing.assert_close(control, sum(each.control[name] for each in known) / len(known))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adamw"}, 'training.optimizer="adamw": a control is the mean gradient'),
        ({"momentum": 0.5}, "training.momentum=0.5: a control is"),
        ({"schedule_over": "steps"}, 'training.schedule_over="steps": a control is'),
    ],
)
def test_training_whose_update_is_no_sum_of_gradients_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Scaffold(training=replace(TRAINING, **changes))
