"""Ferret over an adapter: with as many coordinates as the adapter has weights it is the adapter's own method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedferret.algorithms.fedit import FedIT, FedITSGD
from fedferret.algorithms.fednova import FedNova
from fedferret.algorithms.ferret import Ferret
from fedferret.algorithms.ferret_published import FerretPublished
from fedferret.algorithms.registry import method
from fedferret.algorithms.scaffold import Scaffold
from fedferret.bases.blocks import decode_norms
from fedferret.config import build_algorithm
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from fedferret.settings import table_of
from toys import ONE_BIT, AnyAlgorithm, LastWord, bits, simulate, toy_language_model, toy_model, toy_task, weights

ADAM = FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3, clip=None)
LORA: dict[str, Any] = {"name": "fedit", "rank": 2, "alpha": 4, "modules": ["0", "2"]}


@pytest.mark.parametrize("keys", ["shared", "per-client"])
def test_with_as_many_coordinates_as_weights_it_is_fedit(keys: Any) -> None:
    """Sign buckets of one weight each: the basis is the identity but for signs. LoRA has 74 weights here."""
    exact = replace(ONE_BIT, over=LORA, keys=keys, coordinates=74, bits=32, entry_bits=32, training=ADAM)
    theirs = weights(simulate(FedIT(rank=2, alpha=4, modules=("0", "2"), training=ADAM), 3))
    for name, weight in weights(simulate(exact, 3)).items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedit-sgd", {"rank": 2, "modules_to_save": ("norm",)}),
        ("ffa-lora", {"rank": 2}),
        ("ssf", {}),
        ("fedprompt", {"virtual_tokens": 3}),
        ("fedptuning", {"virtual_tokens": 3}),
        ("fedptuning-v2", {"virtual_tokens": 2}),
    ],
)
def test_with_as_many_coordinates_as_weights_it_is_any_adapters_method(name: str, settings: dict[str, Any]) -> None:
    theirs: Any = method(name)(training=ADAM, **settings)  # type: ignore[call-arg]

    def task(algorithm: AnyAlgorithm) -> Task:
        return Task.of(algorithm.prepare(toy_language_model(), Key.of(7, "prepare")), LastWord(), 2)

    size = tree.size(tree.parameters(task(theirs).model))
    given = {"over": {"name": name, **settings}, "coordinates": size}
    ours = replace(ONE_BIT, bits=32, entry_bits=32, training=ADAM, **given)  # type: ignore[arg-type]
    assert ours.objectives == theirs.objectives
    expected = weights(simulate(theirs, 2, task=task(theirs)))
    for tensor, weight in weights(simulate(ours, 2, task=task(ours))).items():
        torch.testing.assert_close(weight, expected[tensor], rtol=1e-5, atol=1e-6)


def test_scaffold_and_fednova_over_an_adapter_are_its_own_method_where_they_are_fedavg() -> None:
    """SCAFFOLD in the first round, FedNova with equal steps, both to the bit."""
    training = replace(ADAM, optimizer="sgd")
    theirs = FedITSGD(rank=2, alpha=4, modules=("0", "2"), weighting="equal", training=training)
    for ours, rounds in (
        (Scaffold(over=LORA, training=training), 1),
        (FedNova(over=LORA, weighting="equal", training=training), 3),
    ):
        expected = simulate(theirs, rounds).state.public.weights
        assert bits(simulate(ours, rounds).state.public.weights) == bits(expected)


def test_the_adapter_alone_is_tuned_and_is_merged_when_released() -> None:
    run = simulate(Ferret(over=LORA, coordinates=8, group_size=8, training=ADAM), 2)
    assert all(".lora_" in name for name in run.state.public.weights)
    frozen, base = dict(run.task.model.named_parameters()), toy_model()
    for name in ("0", "2"):
        assert torch.equal(frozen[f"{name}.base_layer.weight"], base.get_parameter(f"{name}.weight"))
    inputs = torch.linspace(-1, 1, 20).view(5, 4)
    with run.algorithm.model(run.task, run.state.public) as model:
        expected = model(inputs)
        released = run.algorithm.release(model)
    assert list(dict(released.named_parameters())) == list(dict(toy_model().named_parameters()))
    torch.testing.assert_close(released(inputs), expected)


def test_a_coordinate_for_each_of_an_adapters_tiny_blocks_is_enough() -> None:
    """Tensors of 8, 32, 32 and 2 weights are four blocks; a block without a gradient has its one coordinate too."""
    least = replace(ONE_BIT, over=LORA, coordinates=4, bits=32, entry_bits=32, training=replace(ADAM, steps=1))
    run = simulate(least, 2)
    projector = run.algorithm.projector(run.state.public)
    assert [block.size for block in projector.blocks] == [8, 32, 32, 2]
    assert projector.counts(decode_norms(run.state.public.norms)) == (1, 1, 1, 1)
    first = simulate(least, 2, until=1).state.public  # with B = 0 a first step moves no A
    start = tree.parameters(toy_task(1, least).model)
    for name, weight in first.weights.items():
        assert torch.equal(weight, start[name]) == (".lora_A." in name)


def test_both_forms_of_over_are_one_run() -> None:
    name, table = Ferret(over="fedit"), Ferret(over={"name": "fedit", "rank": 8})
    assert name == table and build_algorithm("ferret", table_of(name)) == name
    assert Ferret(over={"name": "fedit", "rank": 4}) != name
    assert "over" not in table_of(Ferret())  # runs from before there was the setting keep their identity


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("fedavg", "fedavg tunes the model itself, as ferret does without over; leave over out"),
        ("ferret", "over an adapter, not over ferret"),
        ("fedsa-lora", "leaves weights with each client"),
        ("fibecfed", "leaves weights with each client"),
        ("slora", "has several stages, and no one adapter"),
        ("fedex-lora", "changes weights under its adapter"),
        ("fedlt", "no method is called"),
        ({"rank": 4}, "there is no name in it; name a method that tunes an adapter"),
        ({"name": "fedit", "rank": 0}, "rank=0: must be at least 1"),
        ({"name": "fedit", "rnk": 4}, r'over\.rnk: there is no such setting; did you mean "rank"'),
        ({"name": "fedit", "training": {"steps": 3}}, r"as ferret says; set algorithm\.training"),
        ({"name": "fedit", "adapter": "folder"}, "begins from a new adapter"),
    ],
)
def test_what_has_no_adapter_to_give_is_refused_in_one_line(over: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        build_algorithm("ferret", {"over": over})
    assert "\n" not in str(raised.value)


def test_settings_that_do_not_fit_the_adapter_are_refused_before_work() -> None:
    above = Ferret(over={**LORA, "rank": 5, "modules": ["0"]}, coordinates=8)
    with pytest.raises(UserError, match="at most rank 4"):
        above.check(toy_task(1, above).model, 1)
    few = Ferret(over={**LORA, "modules": ["0"]}, coordinates=1, group_size=1)
    with pytest.raises(UserError, match="coordinates=1: this model has 2 blocks and 40 weights, choose 2 to 40"):
        few.check(toy_task(1, few).model, 1)
    private = Ferret(over={"name": "ssf", "private_norms": True}, coordinates=20, group_size=1)
    with pytest.raises(UserError, match="ssf leaves weights with each client"):
        private.check(private.prepare(toy_language_model(), Key(1)), 1)
    with pytest.raises(UserError, match="the published code has none of these"):
        FerretPublished(over="fedit")
