"""Methods that share some weights: with all of them FedAvg, and a private weight never leaves its client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from inspect import get_annotations

import pytest
import torch

from fedferret.algorithms.fedavg import Delta, FedAvg
from fedferret.algorithms.partly_private import PartlyPrivate
from fedferret.algorithms.registry import catalogue, method
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import tensors
from fedferret.engines.debug import Debug
from toys import TRAINING, simulate, toy_clients, toy_model


@dataclass(frozen=True, kw_only=True)
class Beginning(PartlyPrivate):
    """Shares the tensors whose names begin so."""

    begins: str = "0."

    def shares(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name.startswith(self.begins)]


@pytest.mark.parametrize("name", catalogue())
def test_a_setting_has_the_default_of_the_nearest_class_that_declares_it(name: str) -> None:
    """A dataclass of several bases takes each field of the first base, those that this base inherits included."""
    for setting in fields(method(name)):
        declared = next(base for base in method(name).__mro__ if setting.name in get_annotations(base))
        known = {each.name: each for each in fields(declared)}[setting.name]
        for kind in ("default", "default_factory"):
            assert getattr(setting, kind) == getattr(known, kind), f"{setting.name}: declared by {declared.__name__}"


FIRST_LAYER = Beginning(training=TRAINING)


def test_with_all_weights_shared_it_is_fedavg_to_the_bit() -> None:
    assert simulate(PartlyPrivate(training=TRAINING), 3).memory == simulate(FedAvg(training=TRAINING), 3).memory


def test_with_one_client_it_is_fedavg_of_one_client() -> None:
    """Fresh optimisers begin each round from where the client was, whichever of the two remembers the weights."""
    only = toy_clients(1)
    ours, theirs = simulate(FIRST_LAYER, 3, data=only), simulate(FedAvg(training=TRAINING), 3, data=only)
    client = ours.store.get("a")
    assert client is not None and list(client.weights) == ["2.weight", "2.bias"]
    with ours.algorithm.model(ours.task, ours.state.public, client) as model:
        assert model is not None
        for name, weight in tree.parameters(model).items():
            torch.testing.assert_close(weight, theirs.state.public.weights[name], rtol=0, atol=1e-7)


def test_a_choice_that_shares_nothing_is_refused() -> None:
    FIRST_LAYER.check(toy_model(), 1)
    with pytest.raises(UserError, match="nothing would be shared"):
        replace(FIRST_LAYER, begins="no such name").check(toy_model(), 1)


def test_private_weights_stay_at_their_client() -> None:
    """What is sent has the shared names alone; the public values of the others never move; clients' own differ."""
    run = simulate(FIRST_LAYER, 3, engine=Debug)
    reply = run.algorithm.client_update(run.task, run.state.public, run.store.get("b"), run.data["b"], Key.of(1))
    assert isinstance(reply.payload, Delta) and list(reply.payload.delta) == ["0.weight", "0.bias"]
    base = dict(toy_model().named_parameters())
    for name in ("2.weight", "2.bias"):
        assert torch.equal(run.state.public.weights[name], base[name])
        assert not torch.equal(run.store.get("a").weights[name], run.store.get("b").weights[name])
    assert not torch.equal(run.state.public.weights["0.weight"], base["0.weight"])
    cost = run.algorithm.wire_cost(tree.shapes(run.state.public.weights), 3, 1)
    assert cost.up_most == sum(4 * each.numel() for _, each in tensors(reply.payload))
    assert cost.client_state_bytes == sum(4 * each.numel() for _, each in tensors(reply.client))


def test_an_update_of_a_private_weight_is_refused() -> None:
    run = simulate(FIRST_LAYER, 1)
    whole = Delta(tree.zeros_like(run.state.public.weights))
    for refuse in (run.algorithm.accept, run.algorithm.accept_sum):
        with pytest.raises(ValueError, match="tensors are not the model's"):
            refuse(run.task, run.state.public, whole)


def test_a_client_begins_from_the_public_values_and_goes_on_from_its_own() -> None:
    run = simulate(FIRST_LAYER, 2)
    public = run.state.public
    first = run.algorithm.init_client(run.task, public, run.data["a"], Key.of(1))
    assert first is not None
    for name, weight in first.weights.items():
        assert torch.equal(weight, public.weights[name])
        assert weight.data_ptr() != public.weights[name].data_ptr()
    own = run.store.get("a")
    assert run.algorithm.private_of(run.task, public, own).keys() == own.weights.keys()
    with run.algorithm.model(run.task, public, own) as model:
        assert model is not None
        assert torch.equal(tree.parameters(model)["2.weight"], own.weights["2.weight"])
        assert torch.equal(tree.parameters(model)["0.weight"], public.weights["0.weight"])
