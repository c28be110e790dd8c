"""Where FedPFT becomes something simpler: class moments, one-off, a tuner; and what of features crosses the wire."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedpft import FedPFT
from fedferret.algorithms.fedpft_messages import LARGEST, Mixtures, bytes_of
from fedferret.algorithms.fedpft_server import drawn_features, rows_of
from fedferret.algorithms.fedpft_then import FedPFTThen
from fedferret.build import load_data
from fedferret.config import from_tables
from fedferret.core.errors import UserError
from fedferret.core.exchanges import Failure
from fedferret.core.keys import Key
from fedferret.core.pooling import tensors
from fedferret.core.task import Task
from fedferret.engines.in_process import InProcess
from fedferret.local.feature_statistics import feature_statistics, features_of
from fedferret.local.first_order import FirstOrder
from fedferret.local.gaussian_mixtures import Kind, num_values
from toy_classifier import THREE_CLASSES
from toys import TRAINING, Simulation, ToyData, bits, simulate, toy_classifier, toy_clients, toy_model, weights

KINDS: tuple[Kind, ...] = ("spherical", "diagonal", "full")
HEAD = FirstOrder(optimizer="adamw", learning_rate=0.05, clip=None, steps=8, batch_size=16)
ONE = FedPFT(head=HEAD)
KEY = Key.of(5)


def sent(method: FedPFT, client: str = "c", data: Any = None) -> Mixtures:
    """What a client sends in round 1."""
    task = Task.of(method.prepare(toy_classifier(), KEY), THREE_CLASSES, 1)
    public, _ = method.init(task, KEY)
    return method.client_update(task, public, None, data or toy_clients()[client], KEY).payload


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_is_the_moments_of_each_class_and_no_feature(kind: Kind) -> None:
    task = Task.of(toy_classifier(), THREE_CLASSES, 1)
    sums = feature_statistics(features_of(task, toy_clients()["c"]), 3, order=2)
    found = sent(replace(ONE, covariance=kind)).by_label()
    features = torch.cat([x for x, _ in features_of(task, toy_clients()["c"])]).float()
    assert sums.moments_CHH is not None and list(found) == [0, 2] and sums.counts_C.tolist() == [7, 1, 7]
    for label, (count, mixture) in found.items():
        mean_H = sums.sums_CH[label] / count
        covariance_HH = sums.moments_CHH[label] / count - mean_H.outer(mean_H) + 1e-6 * torch.eye(6)
        lower = covariance_HH[*torch.tril_indices(6, 6)]
        wanted = {
            "spherical": covariance_HH.diagonal().mean()[None],
            "diagonal": covariance_HH.diagonal(),
            "full": lower,
        }
        assert count == sums.counts_C[label] and mixture.weights_K.tolist() == [1]
        torch.testing.assert_close(mixture.means_KH[0].double(), mean_H, rtol=0, atol=1e-6)
        torch.testing.assert_close(mixture.covariances_KS[0].double(), wanted[kind], rtol=0, atol=1e-6)
        assert torch.cdist(mixture.means_KH, features).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_has_the_formulas_bytes_and_the_fewest_examples_have_fewer_components(kind: Kind) -> None:
    found = sent(replace(ONE, components=3, covariance=kind))
    values = sum(each.numel() * each.itemsize for _, each in tensors(found))
    assert values == sum(bytes_of(1, components, 6, kind) for components in found.components.tolist())
    assert found.components.tolist() == [min(3, count // 2) for count in found.counts.tolist()]
    assert bytes_of(1, 1, 6, kind) == 9 + 4 * (1 + 6 + num_values(kind, 6))


def rows_with(*targets: float) -> ToyData:
    """A client with these targets, and different inputs."""
    return ToyData(torch.eye(len(targets), 4), torch.tensor(targets)[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_one_example_is_left_out_or_has_the_pooled_covariance(kind: Kind) -> None:
    data = rows_with(0.9, 0.9, -0.9)
    assert sent(replace(ONE, covariance=kind), data=data).labels.tolist() == [2]
    low, high = sent(replace(ONE, covariance=kind, min_examples=1), data=data).by_label().values()
    assert (low[0], high[0]) == (1, 2)
    floor = torch.zeros(1) if kind == "full" else torch.tensor(1e-6)
    torch.testing.assert_close(
        low[1].covariances_KS, (high[1].covariances_KS - floor) * 2 / 3 + floor, rtol=1e-3, atol=1e-6
    )


def test_the_server_draws_as_many_features_as_there_are_examples_each_from_noise_of_its_own() -> None:
    each = [sent(replace(ONE, min_examples=1), client) for client in toy_clients()]
    sizes = [float(len(data)) for data in toy_clients().values()]
    features = drawn_features(each, rows_of(each, sizes, 100), "diagonal", KEY)
    counts = torch.stack([torch.zeros(3).index_add_(0, one.labels, one.counts.float()) for one in each]).sum(0)
    assert torch.equal(torch.bincount(features.y_N).float(), counts) and len(features) == sum(sizes)
    means = torch.cat([one.means.repeat_interleave(one.counts.long(), dim=0) for one in each])
    noise = (features.x_NH - means) / torch.cat(
        [one.covariances.repeat_interleave(one.counts.long(), 0) for one in each]
    ).sqrt()
    assert torch.unique(noise).numel() > 0.95 * noise.numel()


@pytest.mark.parametrize(
    ("counts", "weights_", "most", "rows"),
    [
        ([[3, 9], [4]], [12.0, 4.0], 100, [[3, 9], [4]]),  # as many as there are
        ([[3, 9], [4]], [13.0, 4.0], 100, [[3, 9], [4]]),  # a class of one example was left out
        ([[30, 90], [40]], [120.0, 40.0], 16, [[3, 9], [4]]),  # fewer in all
        ([[10**9], [20], [30]], [200.0, 20.0, 30.0], 10**4, [[200], [20], [30]]),  # a claim that was bounded
        ([[10**9], [20]], [1.0, 1.0], 10**4, [[20], [20]]),  # two clients, which weigh equally
    ],
)  # fmt: skip
def test_a_client_draws_no_more_rows_than_it_weighs(counts: Any, weights_: Any, most: int, rows: Any) -> None:
    class Claim:
        def __init__(self, own: list[int]) -> None:
            self.counts = torch.tensor(own)

    assert rows_of([Claim(own) for own in counts], weights_, most) == rows  # type: ignore[misc]


def test_a_chain_adds_counts_once_for_each_client_and_keeps_its_messages_length() -> None:
    chain = replace(ONE, chain=True, min_examples=1)
    run = simulate(chain, 5, per_round=1)
    walked = {client for record in run.records for client in record.bytes_up}
    assert 1 < len(walked) < 5  # one came again, and passed on what it got
    assert int(run.state.public.mixtures.counts.sum()) == sum(len(toy_clients()[client]) for client in walked)
    assert run.algorithm.note(run.state.public) == "the chain's mixtures are of 36 examples in 3 classes"
    lengths = [length for record in run.records for length in record.bytes_up.values()]
    assert max(lengths) - min(lengths) <= 8  # numbers in the framing
    assert bits(simulate(chain, 1, data={"a": toy_clients()["a"]}).state.public.weights) == bits(
        simulate(replace(ONE, min_examples=1), 1, data={"a": toy_clients()["a"]}).state.public.weights
    )
    with pytest.raises(UserError, match=r"set clients.per_round=1"):
        simulate(chain, 3)


def test_without_a_first_round_a_tuner_is_itself_and_with_one_it_begins_from_the_head() -> None:
    fedavg = FedAvg(training=TRAINING)
    then = {"name": "fedavg", "training": {"learning_rate": 0.1, "steps": 2, "batch_size": 4}}
    task = Task.of(toy_classifier(), THREE_CLASSES, 3)
    alone = simulate(fedavg, 3, task=task)
    zero = simulate(FedPFTThen(then=then, start_rounds=0), 3, task=Task.of(toy_classifier(), THREE_CLASSES, 3))
    assert bits(weights(zero)) == bits(weights(alone)) and [record.bytes_up for record in zero.records] == [
        record.bytes_up for record in alone.records
    ]
    run = simulate(FedPFTThen(then=then, start=ONE), 3, until=1)
    head = simulate(ONE, 1).state.public.weights
    begun = weights(run)
    lora = FedPFTThen(then={"name": "fedit", "rank": 2, "modules": ["body.0"]}, start=ONE)
    assert torch.equal(weights(simulate(lora, 3, until=1))["head.weight"], head["head.weight"])
    assert run.state.public.stage == 1 and len(begun) == 4
    assert all(
        torch.equal(begun[name], head.get(name, weight)) for name, weight in toy_classifier().state_dict().items()
    )


def test_a_covariance_that_is_not_positive_is_that_clients_refusal_and_the_round_goes_on() -> None:
    class Tampering(InProcess):
        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            update, private = super().work(state, client, body, data)
            wrong = replace(update.payload, covariances=-update.payload.covariances)
            return (replace(update, payload=wrong) if client == "ab" else update), private

    data = toy_clients()
    run = simulate(ONE, 1, data={**data, "ab": data["a"]}, engine=Tampering)
    (failure,) = run.records[0].failures
    assert failure == Failure("ab", "pool", "a covariance is not positive") and run.public == simulate(ONE, 1).public


def test_every_claim_of_a_mixture_is_checked() -> None:
    run = simulate(ONE, 1)
    good = sent(ONE)
    for field, value, reason in (
        ("covariances", -good.covariances, "a covariance is not positive"),
        ("covariances", good.covariances * 1e14, "larger than that of any features"),
        ("weights", good.weights * 0.5, "with the sum 1"),
        ("means", good.means + 3 * LARGEST, "farther out"),
        ("counts", good.counts * 0, "a mixture of 0 examples"),
        ("labels", good.labels + 1, "ascending numbers below 3"),
        ("labels", good.labels.flip(0), "ascending numbers below 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            ONE.accept(run.task, run.state.public, replace(good, **{field: value}))
    full = sent(replace(ONE, covariance="full"))
    wrong = full.covariances.clone()
    wrong[0, 1] = 10  # off the diagonal: two coordinates that correlate more than they vary
    with pytest.raises(ValueError, match="not positive"):
        replace(ONE, covariance="full").accept(run.task, run.state.public, replace(full, covariances=wrong))


def test_features_that_are_not_finite_fail_their_client_alone() -> None:
    data = toy_clients()
    x = data["a"].x.clone()  # type: ignore[attr-defined]
    x[2, 1] = torch.nan
    run = simulate(ONE, 1, data={**data, "ab": ToyData(x, data["a"].y)})  # type: ignore[attr-defined]
    (failure,) = run.records[0].failures
    assert (
        failure == Failure("ab", "local", failure.reason) and "features of 1 of 9 examples hold NaN" in failure.reason
    )
    assert run.public == simulate(ONE, 1).public


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"rounds": 2}, "is over after 1, set rounds=1"),
        ({"rounds": 3, "algorithm": {"chain": True}}, "set clients.per_round=1"),
        ({"algorithm": {"components": 300}}, "components=300: must lie between 1 and 255"),
        ({"algorithm": {"floor": 0.0}}, "floor=0.0: must be greater than 0"),
        ({"algorithm": {"head": {"checkpoint_activations": True}}}, "has no activations to drop"),
        ({"objective": {"name": "next-token"}}, 'cannot take objective "next-token"'),
    ],
)
def test_bad_settings_are_named_before_work(tables: dict[str, Any], reason: str) -> None:
    recipe: dict[str, Any] = {"rounds": 1, "model": {"name": "lenet5"}, "data": {"source": "digits"}}
    recipe |= {"clients": {"per_round": 2}, **tables}
    recipe["algorithm"] = {"name": "fedpft", **tables.get("algorithm", {})}
    with pytest.raises(UserError, match=reason):
        from_tables(recipe)


@pytest.mark.parametrize("name", ["fedpft", "fedpft-then"])
def test_min_examples_above_every_clients_largest_class_is_named_before_work(name: str) -> None:
    tables: dict[str, Any] = {"rounds": 2 if "then" in name else 1, "model": {"name": "lenet5"}}
    partition = {"kind": "iid", "clients": 2}
    tables |= {"data": {"source": "digits", "max_examples": 200, "max_held_out": 50, "partition": partition}}
    given = {"min_examples": 90}
    tables |= {"clients": {"per_round": 2}, "algorithm": {"name": name, **(given if name == "fedpft" else {})}}
    if name == "fedpft-then":
        tables["algorithm"] |= {"start": given, "then": "fedavg"}
    with pytest.raises(UserError, match=r"min_examples=90: no client has more than \d+ examples of one class"):
        load_data(from_tables(tables))
    load_data(replace(from_tables(tables), algorithm=replace(ONE, min_examples=3)))


def test_a_model_without_a_head_and_a_folder_for_a_normalised_head_are_refused() -> None:
    with pytest.raises(UserError, match="features that a head reads"):
        ONE.prepare(toy_model(), KEY)
    with pytest.raises(UserError, match='set normalise="none"'):
        replace(ONE, normalise="l2").release(toy_classifier())
    for start in (replace(ONE, normalise="l2"), replace(ONE, chain=True)):
        with pytest.raises(UserError, match=r"start\.(normalise|chain)="):
            FedPFTThen(start=start)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"then": "slora"}, "no method of one stage"),
        ({"then": "fedpft"}, "no method of one stage"),
        ({"then": "fedper"}, "no global model that could begin"),
        ({"then": {"rank": 2}}, "there is no name in it"),
        ({"then": "fedavgg"}, 'did you mean "fedavg"'),
        ({"start_rounds": 2}, "1 or 0"),
    ],
)
def test_what_cannot_follow_is_named(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        FedPFTThen(**settings)


def test_a_normalised_head_reads_what_the_mixtures_are_of() -> None:
    method = replace(ONE, normalise="l2")
    run: Simulation = simulate(method, 1)
    (rows,) = toy_clients()["c"].batches(20, None)
    with method.model(run.task, run.state.public) as model, torch.no_grad():
        x_NH: Tensor = torch.nn.functional.normalize(model.features(rows))  # type: ignore[operator]
        wanted = x_NH @ run.state.public.weights["head.weight"].T + run.state.public.weights["head.bias"]
        torch.testing.assert_close(model(rows), wanted)
    assert float(sent(method).means.norm(dim=1).max()) <= 1
