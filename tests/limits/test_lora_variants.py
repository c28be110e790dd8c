"""LoRA variants: where they are FedIT, where they are exact, and what stays at a client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedferret.algorithms.fedex_lora import FedExLoRA
from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.fedsa_lora import FedSALoRA
from fedferret.algorithms.ffa_lora import FFALoRA
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.node import client_key
from fedferret.core.norms import euclidean_norm
from fedferret.core.pooling import basic_pool, tensors
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from toys import AnyAlgorithm, Simulation, SquaredError, normal, simulate, toy_clients, toy_model

ADAM = FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3, clip=None)
SETTINGS: dict[str, Any] = {"rank": 2, "alpha": 5, "modules": ("0", "2"), "training": ADAM}
B = ("0.lora_B.default.weight", "2.lora_B.default.weight")


def merged(run: Simulation, client: Any = None) -> dict[str, Tensor]:
    """The weights of a run's model, factors merged, in float64."""
    with run.algorithm.model(run.task, run.state.public, client) as model:
        assert model is not None
        return plain(model)


def plain(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a model with LoRA stands for, merged by hand in float64; the model stays as it is."""
    found = {name: weight.detach().double() for name, weight in model.named_parameters()}
    weights = {name: weight for name, weight in found.items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_B"):
            untyped: Any = layer
            product = found[f"{name}.lora_B.default.weight"] @ found[f"{name}.lora_A.default.weight"]
            scaled = untyped.scaling["default"] * product
            weights[f"{name}.base_layer.weight"] += scaled.T if untyped.fan_in_fan_out else scaled
    return weights


def test_ffa_lora_is_fedit_with_a_frozen_to_the_bit() -> None:
    assert simulate(FFALoRA(**SETTINGS), 3).memory == simulate(FedIT(freeze_a=True, **SETTINGS), 3).memory


def transposed_model() -> nn.Module:
    """The toy model with GPT-2's kind of module, whose weight is of (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(Conv1D(16, 4), nn.Tanh(), nn.Linear(16, 1))
    for number, weight in enumerate(model.parameters()):
        weight.data.copy_(0.5 * normal(Key.of(number), *weight.shape))
    return model


def distance_from_the_mean(algorithm: AnyAlgorithm, start: Callable[[], nn.Module] = toy_model) -> float:
    """How far the model after round 2 is from the weighted mean of the clients' models, as a share of its step."""

    def task() -> Task:
        return Task.of(algorithm.prepare(start(), Key.of(7, "prepare")), SquaredError(), 2)

    run, after = simulate(algorithm, 2, until=1, task=task()), simulate(algorithm, 2, task=task())
    before = merged(run)
    mean = {name: torch.zeros_like(weight) for name, weight in before.items()}
    total = sum(map(len, run.data.values()))
    for client, rows in run.data.items():
        algorithm.client_update(run.task, run.state.public, None, rows, client_key(run.seed, 2, client))
        for name, weight in plain(run.task.model).items():
            mean[name] += len(rows) / total * weight
    steps = {name: weight - before[name] for name, weight in merged(after).items()}
    missed = {name: step - (mean[name] - before[name]) for name, step in steps.items()}
    return euclidean_norm(missed.values()) / euclidean_norm(steps.values())


def test_with_fedex_lora_the_model_after_a_round_is_the_mean_of_the_clients_models() -> None:
    """Up to the rounding of fp32, which is 6e-8 of a weight; FedIT misses hundredths of its step."""
    assert distance_from_the_mean(FedExLoRA(**SETTINGS)) < 3e-6
    assert distance_from_the_mean(FedExLoRA(**SETTINGS, rslora=True), transposed_model) < 3e-6
    assert distance_from_the_mean(FedIT(**SETTINGS)) > 0.01


def test_fedex_lora_is_fedit_where_the_mean_is_exact_already() -> None:
    """One client: to the bit. A frozen: up to the order of additions. The weights under the factors stay."""
    only = toy_clients(1)
    for settings, data, tolerance in (({}, only, 0.0), ({"freeze_a": True}, toy_clients(), 1e-6)):
        ours = simulate(FedExLoRA(**SETTINGS, **settings), 3, data=data).state.public
        theirs = simulate(FedIT(**SETTINGS, **settings), 3, data=data).state.public
        for name, weight in theirs.weights.items():
            torch.testing.assert_close(ours.weights[name], weight, rtol=0, atol=tolerance)
        for name, weight in ours.base.items():
            assert torch.equal(weight, toy_model().get_parameter(f"{name}.weight"))


def test_fedex_loras_cost_down_grows_with_the_cohort_to_the_byte() -> None:
    run = simulate(FedExLoRA(**SETTINGS), 2, until=1)
    public, weights = run.state.public, tree.size(run.state.public.weights)
    for count in (1, 2, 3):
        pool = basic_pool(run.algorithm.pooling)
        for client in list(run.data)[:count]:
            payload = run.algorithm.client_update(run.task, public, None, run.data[client], Key.of(1)).payload
            pool.add(payload.decoded(), 1.0)
        _, entry = run.algorithm.server_update(run.task, public, None, pool.result(), Key.of(1))
        cost = run.algorithm.wire_cost(tree.shapes(public.weights), count, 2)
        assert cost.down_most == sum(4 * each.numel() for _, each in tensors(entry)) == count * cost.up_most
        assert cost.up_most == 4 * weights


def test_fedsa_lora_with_one_client_is_fedit_of_one_client() -> None:
    only = toy_clients(1)
    ours, theirs = simulate(FedSALoRA(**SETTINGS), 3, data=only), simulate(FedIT(**SETTINGS), 3, data=only)
    expected = merged(theirs)
    for name, weight in merged(ours, ours.store.get("a")).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_with_fedsa_lora_a_is_averaged_and_every_b_stays_at_its_client() -> None:
    run = simulate(FedSALoRA(**SETTINGS), 2)
    public, clients = run.state.public, [run.store.get(client) for client in run.data]
    assert [tuple(client.weights) for client in clients] == [B] * 3
    assert not any(public.weights[name].any() for name in B)
    assert not torch.equal(clients[0].weights[B[0]], clients[1].weights[B[0]])
    reply = run.algorithm.client_update(run.task, public, clients[0], run.data["a"], Key.of(1))
    assert list(reply.payload.delta) == [name for name in public.weights if ".lora_A." in name]
    with run.algorithm.model(run.task, public) as model:
        assert model is None


def test_fedsa_loras_client_keeps_a_classifiers_head_unless_it_is_shared() -> None:
    shapes = {
        "encoder.0.lora_A.default.weight": (2, 4),
        "encoder.0.lora_B.default.weight": (5, 2),
        "head.weight": (3, 4),
    }
    private = FedSALoRA(**SETTINGS).wire_cost(shapes, 3, 1)
    shared = FedSALoRA(**SETTINGS, private_head=False).wire_cost(shapes, 3, 1)
    assert (private.up_most, private.client_state_bytes) == (4 * 8, 4 * (10 + 12))
    assert (shared.up_most, shared.client_state_bytes) == (4 * (8 + 12), 4 * 10)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (FFALoRA, {"freeze_a": False}, "ffa-lora is FedIT with A frozen"),
        (FFALoRA, {"dora": True}, "no mean of the models"),
        (FedSALoRA, {"freeze_a": True}, "nothing would be shared; choose ffa-lora"),
        (FedSALoRA, {"dora": True}, "does not say who has the magnitudes"),
        (FedExLoRA, {"dora": True}, "no sum of weights and factors"),
        (FedExLoRA, {"server_learning_rate": 0.5}, "the mean of the clients' models itself; leave it out"),
    ],
)
def test_settings_that_contradict_a_method_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(**{**SETTINGS, **settings})


def test_a_rank_above_a_matrixs_is_refused_before_work() -> None:
    kinds: tuple[Any, ...] = (FedIT, FFALoRA, FedSALoRA, FedExLoRA)
    for kind in kinds:
        fits, above = (kind(**{**SETTINGS, "modules": ("0",), "rank": rank}) for rank in (4, 5))
        fits.check(fits.prepare(toy_model(), Key(1)), 1)
        with pytest.raises(UserError, match=r"^rank=5: 0 has 16 x 4 weights.* set rank=4 or less"):
            above.check(above.prepare(toy_model(), Key(1)), 1)
