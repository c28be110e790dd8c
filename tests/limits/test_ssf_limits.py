"""Where scales and shifts become something simpler, and where their mean is the mean of the merged models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.ssf import SSF
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters
from toys import SquaredError, normal, simulate, toy_language_model, toy_model

SGD = FirstOrder(learning_rate=0.1, steps=3, clip=None)
KEY = Key.of(2, "ssf")


def test_shifts_alone_are_fedavg_of_the_biases() -> None:
    ours, theirs = SSF(training=SGD).prepare(toy_model(), KEY), toy_model()
    for model, kept in ((ours, "ssf_shift"), (theirs, "bias")):
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.endswith(kept))
    run = simulate(SSF(training=SGD), 4, task=Task.of(ours, SquaredError(), 4))
    biases = simulate(FedAvg(training=SGD), 4, task=Task.of(theirs, SquaredError(), 4)).state.public.weights
    with run.algorithm.model(run.task, run.state.public) as tuned:
        assert tuned is not None
        merged = dict(run.algorithm.release(tuned).named_parameters())
    for name, bias in biases.items():
        torch.testing.assert_close(merged[name].detach(), bias, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(bias, toy_model().get_parameter(name), atol=1e-2)


def client(number: int, shift: adapters.Shift) -> dict[str, Tensor]:
    """A client's scales and shifts of the toy language model, by name."""
    model = SSF(shift=shift).prepare(toy_language_model(), KEY)
    key = KEY.fold(number)
    return {name: each + 0.5 * normal(key.fold(name), *each.shape) for name, each in tree.parameters(model).items()}


def merged(values: dict[str, Tensor], shift: adapters.Shift) -> dict[str, Tensor]:
    """The plain model's weights and biases with these values."""
    model = SSF(shift=shift).prepare(toy_language_model(), KEY)
    tree.copy_(tree.parameters(model), values)
    return {name: weight.detach() for name, weight in adapters.released(model).named_parameters()}


def mean(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """With weights 3 and 1."""
    return {name: 0.75 * weight + 0.25 * other[name] for name, weight in one.items()}


def test_the_mean_of_merged_models_is_the_merged_mean() -> None:
    one, other = client(1, "auto"), client(2, "auto")
    theirs = mean(merged(one, "auto"), merged(other, "auto"))
    for name, weight in merged(mean(one, other), "auto").items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_it_is_not_where_a_shift_was_pushed_through_a_scaled_layer() -> None:
    """The bias of what reads a norm is γ' (b + W β) + β', bilinear in γ' and β; everything else is still the mean."""
    one, other = client(1, "pushed"), client(2, "pushed")
    ours, theirs = merged(mean(one, other), "pushed"), mean(merged(one, "pushed"), merged(other, "pushed"))
    gaps = {name: float((weight - theirs[name]).abs().max()) for name, weight in ours.items()}
    read = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    bilinear = [f"model.layers.0.{name}.bias" for name in read]
    assert min(gaps[name] for name in bilinear) > 1e-2
    assert max(gap for name, gap in gaps.items() if name not in bilinear) < 1e-6
    name = bilinear[0]
    weight = toy_language_model().get_parameter("model.layers.0.self_attn.q_proj.weight")
    scale, shift = (
        one[f"model.layers.0.{part}"] - other[f"model.layers.0.{part}"]
        for part in ("self_attn.q_proj.ssf_scale", "input_layernorm.ssf_norm_shift")
    )
    gap = 0.75 * 0.25 * scale * (weight @ shift)  # the covariance of γ' and W β
    torch.testing.assert_close(theirs[name] - ours[name], gap, rtol=1e-4, atol=1e-6)


def test_private_norms_never_travel_and_change_the_clients_models_alone() -> None:
    shared = SSF(training=SGD)
    run = simulate(replace(shared, private_norms=True), 2)
    first = SSF().prepare(toy_language_model(), KEY)
    private = [name for name in run.state.public.weights if ".ssf_norm_" in name]
    assert private == [name for name, _ in first.named_parameters() if "norm.ssf_" in name]
    for name in private:
        assert torch.equal(run.state.public.weights[name], torch.ones(8))
        assert not torch.equal(run.store.get("a").weights[name], run.store.get("b").weights[name])
    with pytest.raises(UserError, match="private_norms=true: no norm is tuned in this model"):
        only = replace(shared, private_norms=True, modules="all-linear")
        only.check(only.prepare(toy_language_model(), KEY), 1)


def test_a_copy_of_a_model_is_merged_apart_from_it() -> None:
    """Stages release a copy; its hooks are its own."""
    model = SSF(initial="normal").prepare(toy_model(), KEY)
    inputs = torch.linspace(-1, 1, 20).view(5, 4)
    before = model(inputs)
    plain: nn.Module = adapters.released(copy.deepcopy(model))
    torch.testing.assert_close(plain(inputs), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(inputs), before)
