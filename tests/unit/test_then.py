"""Composition: the second method takes over, on every node alike, exactly where the first one ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from contract.methods import METHODS
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.ferret import Ferret
from fedferret.core.errors import UserError
from fedferret.core.then import then
from fedferret.wire import codec
from toys import ONE_BIT, SHAPES, TRAINING, simulate, toy_clients, weights

FEDAVG = FedAvg(training=TRAINING)
FERRET = replace(ONE_BIT, coordinates=60, bits=8)


def test_a_method_then_itself_is_itself_where_it_remembers_nothing() -> None:
    both, alone = simulate(then(FEDAVG, FEDAVG, after=2), 4), simulate(FEDAVG, 4)
    assert codec.encode(weights(both)) == codec.encode(weights(alone))


def test_the_first_rounds_are_the_first_methods() -> None:
    both, alone = simulate(then(FERRET, FEDAVG, after=2), 4, until=2), simulate(FERRET, 2)
    assert codec.encode(weights(both)) == codec.encode(weights(alone))
    assert both.state.public.first is None  # handed over


def test_each_stages_schedule_runs_over_its_own_rounds() -> None:
    rates: list[float] = []

    class Heard(Ferret):
        def apply(self, task: Any, public: Any, entry: Any) -> None:
            rates.append(entry.learning_rate)
            super().apply(task, public, entry)

    linear = Heard(coordinates=60, schedule="linear", training=TRAINING)
    simulate(then(linear, linear, after=2), 6)
    assert rates == [1.0, 0.5, 1.0, 0.75, 0.5, 0.25]


def test_the_hand_over_may_change_the_model_and_every_node_does_the_same() -> None:
    def halve(task: Any, model: torch.nn.Module) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.5)

    halved = simulate(then(FERRET, FEDAVG, after=1, hand_over=halve), 3, until=1)
    plain = simulate(then(FERRET, FEDAVG, after=1), 3, until=1)
    assert all(torch.equal(weights(halved)[name], 0.5 * weight) for name, weight in weights(plain).items())


def test_the_hand_over_costs_no_bytes() -> None:
    run = simulate(then(FEDAVG, FERRET, after=1), 3)
    sizes = [sum(record.bytes_up.values()) for record in run.records]
    assert sizes[0] > 3 * sizes[1] and sizes[1] == sizes[2]


def test_private_state_is_born_in_its_stage_for_those_who_come_late_too() -> None:
    method = then(FEDAVG, replace(FERRET, error_feedback=True), after=1)
    run = simulate(method, 6, per_round=1)
    assert {client for record in run.records[1:] for client in record.cohort} == set(toy_clients())
    for record in run.records[1:]:
        assert run.engine.store.get(record.cohort[0]).second is not None


def test_stages_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="after=4: must lie between 1 and rounds - 1 = 3"):
        then(FEDAVG, FERRET, after=4).check(SHAPES, 4)
    with pytest.raises(UserError, match="coordinates=98: this model has"):
        then(FEDAVG, replace(FERRET, coordinates=98), after=2).check(SHAPES, 4)


def test_stages_cost_what_their_dearer_one_does_of_the_wire_and_of_the_disk() -> None:
    cost, alone = METHODS["fedavg-then-ferret"].wire_cost(SHAPES, 3), FEDAVG.wire_cost(SHAPES, 3)
    assert (cost.up, cost.down) == (alone.up, alone.down)
    second = replace(FERRET, error_feedback=True)
    assert (
        then(FEDAVG, second, after=1).wire_cost(SHAPES, 3).client_state_bytes
        == second.wire_cost(SHAPES, 3).client_state_bytes
        > 0
    )
    assert then(FEDAVG, FERRET, after=1).wire_cost(SHAPES, 3).client_state_bytes == 0
