"""Where the two compressed FedAvgs must become FedAvg, and what they may differ by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedavg_8bit import FedAvg8Bit
from fedferret.algorithms.fedavg_top_k import FedAvgTopK
from fedferret.algorithms.sparse_updates import most_values
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import MeanPool
from fedferret.local.first_order import FirstOrder
from toy_updates import flat, trained
from toys import SHAPES, TRAINING, ToyData, simulate, toy_clients, toy_model, toy_task, weights

D = 97  # the toy model's weights
ADAMW = FirstOrder(optimizer="adamw", learning_rate=0.01, steps=3)
TOP_K = FedAvgTopK(fraction=0.1, bits=32, training=TRAINING)
EIGHT_BIT = FedAvg8Bit(training=TRAINING)


@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("training", [TRAINING, ADAMW], ids=lambda training: training.optimizer)
def test_top_k_with_as_many_as_there_are_is_fedavg_to_the_bit(training: FirstOrder, error_feedback: bool) -> None:
    whole = FedAvgTopK(fraction=1.0, bits=32, error_feedback=error_feedback, training=training)
    assert simulate(whole, 4).public == simulate(FedAvg(training=training), 4).public


def test_the_servers_rate_of_top_k_is_fedavgs_to_the_bit() -> None:
    whole = FedAvgTopK(fraction=1.0, bits=32, server_learning_rate=0.7, training=TRAINING)
    assert simulate(whole, 3).public == simulate(FedAvg(server_learning_rate=0.7, training=TRAINING), 3).public


def test_a_client_sends_its_k_largest_changes_and_keeps_the_rest_to_the_bit() -> None:
    task, data = toy_task(1), toy_clients()["b"]
    public, _ = TOP_K.init(task, Key.of(1))
    client = TOP_K.init_client(task, public, data, Key.of(1))
    delta = trained(data, Key.of(2))
    sent = TOP_K.client_update(task, public, client, data, Key.of(2))
    assert sent.client is not None
    positions = sent.payload.positions.unpack()
    dense = torch.zeros(D).index_copy(0, positions, sent.payload.values.unpack())
    assert len(positions) == 10
    assert torch.equal(dense + flat(sent.client.residual), delta)
    assert torch.equal(dense.abs().sort(descending=True).values[:10], delta.abs().sort(descending=True).values[:10])

    # what waits is said next time: training and residual are weighed together
    again = TOP_K.client_update(task, public, sent.client, data, Key.of(2))
    both = delta + flat(sent.client.residual)
    assert torch.equal(again.payload.positions.unpack(), both.abs().topk(10).indices.sort().values)


def test_what_fp16_rounds_off_stays_in_the_residual() -> None:
    half = replace(TOP_K, bits=16)
    task, data = toy_task(1), toy_clients()["b"]
    sent = half.client_update(
        task, half.init(task, Key.of(1))[0], half.init_client(task, None, data, Key.of(1)), data, Key.of(2)
    )
    assert sent.client is not None
    left = flat(sent.client.residual)[sent.payload.positions.unpack()]
    values = sent.payload.values.unpack()
    assert float(left.abs().max()) > 0 and bool((left.abs() <= values.abs() * 2**-11).all())
    torch.testing.assert_close(values + left, trained(data, Key.of(2))[sent.payload.positions.unpack()])


def test_nothing_is_lost_when_all_turns_have_come() -> None:
    """Weights given up + residuals = everything that training ever changed: one client, several rounds."""
    run = simulate(TOP_K, 6, data={"b": toy_clients()["b"]})
    untouched = flat(dict(toy_model().named_parameters()))
    task, public, total = toy_task(6), TOP_K.init(toy_task(6), Key.of(3))[0], torch.zeros(D)
    private = TOP_K.init_client(task, public, run.data["b"], Key.of(1))
    for number in range(1, 7):
        reply = TOP_K.client_update(task, public, private, run.data["b"], Key.of(3, "local", number, "b"))
        total += flat(dict(task.model.named_parameters())) - flat(public.weights)  # as local training left the model
        private = reply.client
        for name, weight in simulate(TOP_K, 6, data={"b": run.data["b"]}, until=number).state.public.weights.items():
            public.weights[name].copy_(weight)
    assert private is not None
    torch.testing.assert_close(flat(weights(run)) - flat(private.residual), untouched + total, rtol=1e-5, atol=1e-6)


def test_top_k_costs_what_its_formula_says_and_the_union_no_more() -> None:
    for fraction, kept in ((0.01, 1), (0.1, 10), (0.5, 48), (1.0, D)):
        method = replace(TOP_K, fraction=fraction)
        cost, run = method.wire_cost(SHAPES, 3, 1), simulate(method, 2)
        for record in run.records:
            assert all(cost.up_least < up <= cost.up_most + 140 for up in record.bytes_up.values())
        assert cost.up_most >= cost.up_least >= 4 * kept and (fraction < 1 or cost.up_least == cost.down_most == 4 * D)


def test_a_number_of_values_is_the_fraction_of_as_many() -> None:
    by_count = FedAvgTopK(values=10, bits=32, training=TRAINING)
    assert simulate(by_count, 3).public == simulate(TOP_K, 3).public
    assert by_count.wire_cost(SHAPES, 3, 1) == TOP_K.wire_cost(SHAPES, 3, 1)


def test_a_forgotten_residual_is_none_and_half_of_it_is_half() -> None:
    """With λ = 0 the public state is that without error feedback; with λ = 1/2 half of what waited is weighed."""
    forgetful = simulate(replace(TOP_K, residual_decay=0.0), 3)
    assert forgetful.public == simulate(replace(TOP_K, error_feedback=False), 3).public
    task, data, half = toy_task(1), toy_clients()["b"], replace(TOP_K, residual_decay=0.5)
    public, _ = half.init(task, Key.of(1))
    first = half.client_update(task, public, half.init_client(task, public, data, Key.of(1)), data, Key.of(2))
    again = half.client_update(task, public, first.client, data, Key.of(2))
    assert first.client is not None
    both = trained(data, Key.of(2)) + flat(first.client.residual) / 2
    assert torch.equal(again.payload.positions.unpack(), both.abs().topk(10).indices.sort().values)


def test_one_bit_is_the_sign_with_the_mean_magnitude_and_the_rest_waits() -> None:
    method, task, data = replace(TOP_K, bits=1), toy_task(1), toy_clients()["b"]
    public, _ = method.init(task, Key.of(1))
    reply = method.client_update(task, public, method.init_client(task, public, data, Key.of(1)), data, Key.of(2))
    delta = trained(data, Key.of(2))
    positions, values = reply.payload.positions.unpack(), reply.payload.values.unpack()
    largest = delta[delta.abs().topk(10).indices.sort().values]
    assert torch.equal(values.sign(), largest.sign()) and float(values.abs().max()) == pytest.approx(
        float(largest.abs().mean())
    )
    assert reply.client is not None
    assert torch.equal(flat(reply.client.residual), delta - torch.zeros(D).index_copy(0, positions, values))


@pytest.mark.parametrize("bits", [32, 16, 8, 1])
def test_what_surely_fits_into_a_budget_is_the_most_that_does(bits: Any) -> None:
    for budget in (3, 100, 10_000):
        kept = most_values(budget, 10**6, bits)
        method, shapes = FedAvgTopK(values=kept or 1, bits=bits), {"w": (1000, 1000)}
        assert (method.wire_cost(shapes, 1, 1).up_most <= budget) == (kept > 0)
        assert replace(method, values=kept + 1).wire_cost(shapes, 1, 1).up_most > budget


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_a_share_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"fraction=.*: must be above 0 and at most 1"):
        FedAvgTopK(fraction=fraction)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"values": 0}, "values=0: must be at least 1"),
        ({"values": 5, "fraction": 0.5}, r"values=5 and fraction=0\.5: .*give one"),
        ({"residual_decay": 1.5}, r"residual_decay=1\.5: must be from 0"),
        ({"residual_decay": 0.5, "error_feedback": False}, r"residual_decay=0\.5: there is no residual"),
    ],
)
def test_settings_of_top_k_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FedAvgTopK(**settings)


def test_more_values_than_the_model_has_are_refused() -> None:
    with pytest.raises(UserError, match=r"values=98: the model has 97 weights"):
        FedAvgTopK(values=98).check(toy_model(), 1)
    FedAvgTopK(values=97).check(toy_model(), 1)


def test_a_round_in_8_bits_is_fedavgs_but_for_two_roundings() -> None:
    """Up and down: a step each of 1/127 of the tensor's largest change, at most."""
    start = {name: weight.detach().clone() for name, weight in toy_model().named_parameters()}
    exact, rounded = weights(simulate(FedAvg(training=TRAINING), 1)), weights(simulate(EIGHT_BIT, 1))
    # no client's change is larger than all of theirs together; each is at most (sum n / n_j) of that
    for name, weight in exact.items():
        largest = max(trained_alone(client)[name] for client in toy_clients())
        assert float((rounded[name] - weight).abs().max()) <= 2.1 * largest / 127
    assert any(not torch.equal(rounded[name], exact[name]) for name in start)


def trained_alone(client: str) -> dict[str, float]:
    """Each tensor's largest change in this client's first round of a run."""
    task, data = toy_task(1), toy_clients()[client]
    before = tree.clone(tree.parameters(task.model))
    TRAINING.train(task, data, Key.of(3, "local", 1, client).fold("train"))
    return {name: float(delta.abs().max()) for name, delta in tree.difference(before, tree.parameters(task.model))}


def test_8_bits_are_right_in_the_mean_over_keys_with_the_error_of_the_formula() -> None:
    """A step of s between levels: error energy s² f (1 - f) a number, f its place between two levels; two-sided."""
    task, data = toy_task(1), toy_clients()["b"]
    public, _ = EIGHT_BIT.init(task, Key.of(1))
    with_change = EIGHT_BIT.client_update(task, public, None, data, Key.of(2))
    delta, sizes = trained(data, Key.of(2)), with_change.payload.delta.sizes
    steps = torch.cat([part.abs().max().expand(len(part)) / 127 for part in delta.split(list(sizes))]).double()
    place = delta / steps - (delta / steps).floor()
    variance = steps**2 * place * (1 - place)
    draws = torch.stack([unpacked(delta, sizes, number) for number in range(400)]).double()
    error = draws - delta
    assert 0.95 < float(error.square().sum(1).mean() / variance.sum()) < 1.05
    # normal, but for places so near a level that two draws in all leave it
    assert bool((error.mean(0).abs() <= 4.5 * (variance / 400).sqrt() + 2 * steps / 400).all())


def unpacked(delta: Tensor, sizes: tuple[int, ...], number: int) -> Tensor:
    """``delta`` rounded by one key and read again, by the method's own functions."""
    from fedferret.bases.chunks import pack_tensors

    return torch.cat(pack_tensors(delta.split(list(sizes)), 8, Key.of(9, number)).unpack())


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_identical_clients_are_one_but_for_roundings_that_cancel(bits: Any) -> None:
    """Each rounds by a key of its own: the mean of eight is off by an eighth of one's error energy."""
    method, rows, task = replace(EIGHT_BIT, bits=bits), toy_clients()["a"], toy_task(1)
    same: Any = ToyData(rows.x, rows.y, shuffled=False)  # type: ignore[attr-defined]
    public, _ = method.init(task, Key.of(1))
    delta, one, eight = trained(same, Key.of(1)), 0.0, 0.0
    for seed in range(20):
        pool = MeanPool()
        for client in range(8):
            pool.add(method.client_update(task, public, None, same, Key.of(seed, client)).payload.decoded(), 1.0)
            mean = torch.cat(pool.result().only.tensors)
            one += float((mean - delta).square().sum()) if not client else 0.0
        eight += float((mean - delta).square().sum())
    assert 0.09 < eight / one < 0.17


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.2), (2, 0.6), (1, 1.2)])
def test_fewer_bits_are_the_same_step_with_more_noise(bits: Any, most: float) -> None:
    start = flat(dict(toy_model().named_parameters()))
    exact = flat(weights(simulate(FedAvg(training=TRAINING), 1))) - start
    coarse = flat(weights(simulate(replace(EIGHT_BIT, bits=bits), 1))) - start
    assert 0 < float((coarse - exact).norm() / exact.norm()) < most
