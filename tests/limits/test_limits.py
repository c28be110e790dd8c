"""Where a method must become another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedprox import FedProx
from fedferret.bases.blocks import decode_norms
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.node import client_key
from fedferret.core.pooling import MeanPool
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
    residual = feedback.store.get("a").residual
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
    """m <- β m + Δ, w <- w - η m: two rounds written out, with every Δ from FedAvg's clients at the same weights."""
    beta, rate = 0.9, 0.5
    task = toy_task(2)
    public, _ = FEDAVG.init(task, Key.of(3, "begin"))
    momentum = tree.zeros_like(public.weights)
    for number in (1, 2):
        pool = MeanPool()
        for client, rows in toy_clients().items():
            reply = FEDAVG.client_update(task, public, None, rows, client_key(3, number, client))
            pool.add(reply.payload, 1.0)
        for name, weight in public.weights.items():
            momentum[name].mul_(beta).add_(pool.result().only.delta[name])
            weight.sub_(rate * momentum[name])
    ferret = replace(EVERYTHING, server_momentum=beta, server_learning_rate=rate, weighting="equal")
    run = simulate(ferret, 2)
    assert_equal_to_rounding(weights(run), public.weights)
    assert_equal_to_rounding(run.state.public.momentum, momentum, rtol=1e-4)


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


def test_ferret_is_unbiased_with_the_error_of_the_formula() -> None:
    """One draw has the formula's error energy, no more and no less; the mean over n draws comes nearer as 1/n."""
    still = FirstOrder(learning_rate=0.1, steps=1, batch_size=1000)
    ferret = replace(EVERYTHING, coordinates=30, training=still, weighting="equal")
    start = toy_task(1).model.state_dict()
    target = weights(simulate(FedAvg(training=still, weighting="equal"), 1))
    data, seeds = toy_clients(), 200
    total, error = {name: torch.zeros_like(weight) for name, weight in target.items()}, 0.0
    for seed in range(seeds):
        task = toy_task(1)
        public, server = ferret.init(task, Key.of(seed, "begin"))
        projector, pool = ferret.projector(public), MeanPool()
        counts = projector.counts(decode_norms(public.norms))
        for client, rows in data.items():
            pool.add(ferret.client_update(task, public, None, rows, Key.of(seed, client)).payload.decoded(), 1.0)
        _, entry = ferret.server_update(task, public, server, pool.result(), Key.of(seed, "update"))
        ferret.apply(task, public, entry)
        for name, weight in public.weights.items():
            total[name] += weight / seeds
            error += float((weight - target[name]).square().sum()) / seeds
    expected = 0.0
    for block, count in zip(projector.blocks, counts, strict=True):
        step = sum(float((target[name] - start[name]).square().sum()) for name in block.names)
        expected += SignBuckets().error_energy(block.size, count) * step
    assert error == pytest.approx(expected, rel=0.1)
    of_the_mean = sum(float((total[name] - weight).square().sum()) for name, weight in target.items())
    assert of_the_mean < 3 * expected / seeds


def relative_error(bits: Any, seed: int) -> float:
    """The energy of what few bits add to one client's step, in units of the step's."""
    one = toy_clients(1)
    exact, coarse = (simulate(replace(EVERYTHING, bits=each), 1, data=one, seed=seed) for each in (32, bits))
    start = toy_task(1).model.state_dict()
    ours, theirs = weights(coarse), weights(exact)
    error = sum(float((ours[name] - weight).square().sum()) for name, weight in theirs.items())
    return error / sum(float((weight - start[name]).square().sum()) for name, weight in theirs.items())


@pytest.mark.parametrize(("bits", "distortion"), [(4, 0.009497), (2, 0.1175), (1, 0.3634)])
def test_fewer_bits_are_the_same_step_with_the_noise_of_the_formula(bits: Any, distortion: float) -> None:
    """Lloyd and Max's distortion D of a Gaussian (1960), rescaled to be unbiased: D / (1 - D)."""
    expected = distortion / (1 - distortion)
    assert 2 / 3 * expected < sum(relative_error(bits, seed) for seed in range(8)) / 8 < 3 / 2 * expected


@pytest.mark.parametrize(("bits", "least", "most"), [(16, 1e-9, 1e-6), (8, 1e-6, 4e-4)])
def test_many_bits_are_the_same_step_with_little_noise(bits: Any, least: float, most: float) -> None:
    assert least < relative_error(bits, 3) < most


@pytest.mark.slow
def test_ferret_with_as_many_coordinates_as_weights_is_fedavg_on_a_language_model() -> None:
    from tiny_runs import tiny_experiment

    training = FirstOrder(learning_rate=0.1, steps=2)
    everything = replace(EVERYTHING, coordinates=90_624, training=training)
    tuned = []
    for algorithm in (everything, FedAvg(training=training)):
        experiment = tiny_experiment(algorithm, rounds=2)
        state = experiment.initial_state()
        list(experiment.run_rounds(state, experiment.engine(state)))
        tuned.append({name: weight.clone() for name, weight in state.public.weights.items()})
    for name, weight in tuned[0].items():
        torch.testing.assert_close(weight, tuned[1][name], rtol=1e-5, atol=1e-6)
