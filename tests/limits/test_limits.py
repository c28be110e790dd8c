"""Where a method must become another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedprox import FedProx
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.core.keys import Key
from fedferret.core.pooling import Pool
from fedferret.local.first_order import FirstOrder
from toys import ONE_BIT, TRAINING, ToyData, bits, simulate, toy_clients, toy_task, weights

D = 97  # the toy model's weights
EVERYTHING = replace(ONE_BIT, coordinates=D, bits=32, entry_bits=32)
FEDAVG = FedAvg(training=TRAINING)


def assert_equal_to_rounding(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-5) -> None:
    for name, weight in left.items():
        torch.testing.assert_close(
            weight, right[name], rtol=rtol, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("keys", ["shared", "per-client"])
@pytest.mark.parametrize("allocation", ["norm", "norm-sqrt-dim", "norm-squared", "uniform"])
def test_ferret_with_as_many_coordinates_as_weights_is_fedavg(keys: Any, allocation: Any) -> None:
    ferret = replace(EVERYTHING, keys=keys, allocation=allocation)
    assert_equal_to_rounding(weights(simulate(ferret, 4)), weights(simulate(FEDAVG, 4)))


def test_ferret_with_as_many_coordinates_as_weights_has_no_residual() -> None:
    plain, feedback = simulate(EVERYTHING, 3), simulate(replace(EVERYTHING, error_feedback=True), 3)
    assert_equal_to_rounding(weights(plain), weights(feedback))
    residual = feedback.engine.store.get("a").residual
    assert max(float(tensor.abs().max()) for tensor in residual.values()) < 1e-6


def test_ferret_shrunk_with_as_many_coordinates_as_weights_is_not_shrunk() -> None:
    assert_equal_to_rounding(
        weights(simulate(replace(EVERYTHING, scale="shrunk"), 3)), weights(simulate(EVERYTHING, 3))
    )


def test_ferret_shrunk_is_ferret_times_each_blocks_factor() -> None:
    """1 / (1 + error energy), K_l / d_l for equal buckets; in the toy model every tensor is a block."""
    narrow = replace(EVERYTHING, coordinates=25, allocation="uniform")
    start = toy_task(1).model.state_dict()
    unbiased, shrunk = weights(simulate(narrow, 1)), weights(simulate(replace(narrow, scale="shrunk"), 1))
    for name, count in zip(start, (8, 8, 8, 1), strict=True):
        step = (unbiased[name] - start[name]) * SignBuckets().shrinkage(start[name].numel(), count)
        torch.testing.assert_close(shrunk[name] - start[name], step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [({}, 1.0), ({"server_learning_rate": 0.5}, 0.5), ({"schedule": "linear"}, 1.0), ({"server_momentum": 0.9}, 1.0)],
)
def test_ferrets_first_step_is_fedavgs_times_the_servers_rate(settings: dict[str, Any], rate: float) -> None:
    ferret = simulate(replace(EVERYTHING, **settings), 2, until=1)
    fedavg = simulate(replace(FEDAVG, server_learning_rate=rate), 2, until=1)
    assert_equal_to_rounding(weights(ferret), weights(fedavg))


def test_momentum_is_the_textbooks() -> None:
    """m <- beta m + change, w <- w - rate m, in every round; checked where the change can be read off FedAvg."""
    ferret = simulate(replace(EVERYTHING, server_momentum=0.9, server_learning_rate=0.5), 2, until=1)
    second = simulate(replace(EVERYTHING, server_momentum=0.9, server_learning_rate=0.5), 2)
    start = {name: tensor.clone() for name, tensor in toy_task(1).model.named_parameters()}
    after_one, after_two = weights(ferret), weights(second)
    for name in start:
        m_1 = (start[name] - after_one[name]) / 0.5
        m_2 = (after_one[name] - after_two[name]) / 0.5
        torch.testing.assert_close(ferret.state.public.momentum[name], m_1, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(second.state.public.momentum[name], m_2, rtol=1e-3, atol=1e-5)
        change = m_2 - 0.9 * m_1
        assert change.norm() < 3 * m_1.norm()


def test_fedprox_without_a_pull_is_fedavg_to_the_bit() -> None:
    assert simulate(FedProx(mu=0.0, training=TRAINING), 4).public == simulate(FEDAVG, 4).public
    assert simulate(FedProx(mu=0.5, training=TRAINING), 4).public != simulate(FEDAVG, 4).public


def test_a_stronger_pull_keeps_clients_nearer() -> None:
    training = FirstOrder(learning_rate=0.05, steps=20)
    moved = []
    for mu in (0.0, 1.0, 10.0):
        run = simulate(FedProx(mu=mu, training=training), 1, data=toy_clients(1))
        start = toy_task(1).model.state_dict()
        moved.append(sum(float((weight - start[name]).square().sum()) for name, weight in weights(run).items()))
    assert moved[0] > 1.2 * moved[1] and moved[1] > 1.2 * moved[2]


def test_fedavg_with_one_client_is_centralised_training() -> None:
    data: Any = toy_clients()["b"]
    run = simulate(FEDAVG, 5, data={"b": data})
    central = toy_task(5)
    for number in range(1, 6):
        TRAINING.train(central, data, Key.of(3, "local", number, "b").fold("train"))
    assert_equal_to_rounding(weights(run), dict(central.model.named_parameters()))


def test_fedavg_of_one_full_batch_step_is_a_step_on_all_data() -> None:
    whole = FirstOrder(learning_rate=0.1, steps=1, batch_size=1000, clip=None)
    data: dict[str, Any] = toy_clients()
    union = ToyData(*(torch.cat([getattr(rows, side) for rows in data.values()]) for side in ("x", "y")))
    split, joined = simulate(FedAvg(training=whole), 4), simulate(FedAvg(training=whole), 4, data={"all": union})
    assert_equal_to_rounding(weights(split), weights(joined))
    equal = simulate(FedAvg(training=whole, weighting="equal"), 4)
    assert bits(equal.state.public) != split.public


def test_ferret_is_unbiased() -> None:
    """The mean step over 100 seeds of the directions is FedAvg's, within what its own spread allows."""
    still = FirstOrder(learning_rate=0.1, steps=1, batch_size=1000)
    ferret = replace(EVERYTHING, coordinates=30, training=still)
    target = weights(simulate(FedAvg(training=still), 1))
    data = toy_clients()
    total = {name: torch.zeros_like(weight) for name, weight in target.items()}
    seeds = 100
    for seed in range(seeds):
        task = toy_task(1)
        public, server = ferret.init(task, Key.of(seed, "begin"))
        pool: Pool[Any] = Pool()
        for client, rows in data.items():
            reply = ferret.client_update(task, public, None, rows, Key.of(seed, client))
            pool.add(reply.payload, reply.weight)
        _, entry = ferret.server_update(task, public, server, pool.result(), Key.of(seed, "update"))
        ferret.apply(task, public, entry)
        for name, weight in public.weights.items():
            total[name] += weight / seeds
    start = toy_task(1).model.state_dict()
    error = sum(float((total[name] - weight).square().sum()) for name, weight in target.items())
    step = sum(float((weight - start[name]).square().sum()) for name, weight in target.items())
    assert error < 2 * (D / 30) * step / seeds  # one draw's error energy is (d/K - 1) times the step's


@pytest.mark.parametrize(("bits", "most"), [(32, 1e-6), (16, 1e-3), (8, 0.02), (4, 0.15), (2, 0.45), (1, 0.95)])
def test_fewer_bits_are_the_same_step_with_more_noise(bits: Any, most: float) -> None:
    exact, coarse = simulate(EVERYTHING, 1), simulate(replace(EVERYTHING, bits=bits), 1)
    start = toy_task(1).model.state_dict()
    ours, theirs = weights(coarse), weights(exact)
    error = sum(float((ours[name] - weight).square().sum()) for name, weight in theirs.items())
    step = sum(float((weight - start[name]).square().sum()) for name, weight in theirs.items())
    assert (error / step) ** 0.5 < most
    assert bits == 32 or error > 0


@pytest.mark.slow
def test_ferret_with_as_many_coordinates_as_weights_is_fedavg_on_a_language_model() -> None:
    from tiny_runs import tiny_experiment

    training = FirstOrder(learning_rate=0.1, steps=2)
    everything = replace(EVERYTHING, coordinates=90_624, training=training)
    tuned = []
    for algorithm in (everything, FedAvg(training=training)):
        experiment = tiny_experiment(algorithm, rounds=2)
        state = experiment.initial_state()
        list(experiment.play(state, experiment.engine(state)))
        tuned.append({name: weight.clone() for name, weight in state.public.weights.items()})
    for name, weight in tuned[0].items():
        torch.testing.assert_close(weight, tuned[1][name], rtol=1e-5, atol=1e-6)
