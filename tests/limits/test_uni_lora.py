"""Where Uni-LoRA becomes FedIT and FedAvg, that its map is an isometry, and that peft reads what is exported."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.uni_lora import UniLoRA
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters
from fedferret.models.adapters import adapter_of, released, tuned_modules
from toys import Simulation, normal, simulate, toy_language_model, toy_model, toy_task

ADAM = FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3, clip=None)
UNI = UniLoRA(rank=2, values=30, bound=0.3, modules=("0", "2"), training=ADAM)


def flat(model: nn.Module) -> Tensor:
    """All values of all factors, as they are read."""
    adapter = adapter_of(model)
    assert isinstance(adapter, adapters.UniLoRA)
    return torch.cat([f.detach().view(-1) for module in tuned_modules(model).values() for f in adapter.factors(module)])


def test_with_every_value_used_once_it_is_fedit() -> None:
    """From FedIT's first values, Adam's steps of the vector are Adam's steps of the factors."""
    fedit = FedIT(rank=2, alpha=2, modules=("0",), training=ADAM)
    uni = UniLoRA(rank=2, values=2 * (4 + 16), modules=("0",), training=ADAM)
    theirs, task = simulate(fedit, 4), toy_task(4, uni)
    module = task.model.get_submodule("0")
    ((a, b),) = adapters.factors(toy_task(4, fedit).model).values()
    places = torch.cat([module.get_buffer(f"uni_lora_places_{part}").view(-1) for part in "ab"])
    assert sorted(places.tolist()) == list(range(40))
    with torch.no_grad():
        module.get_parameter("uni_lora_vector")[places] = torch.cat([a.view(-1), b.view(-1)])
    ours = simulate(uni, 4, task=task)
    for name, weight in merged(theirs).items():
        torch.testing.assert_close(merged(ours)[name], weight, rtol=1e-5, atol=1e-5)
    assert (merged(ours)["0.weight"] - toy_model().get_parameter("0.weight")).abs().max() > 0.05


def merged(run: Simulation) -> dict[str, Tensor]:
    """The plain weights of a run's model, copied before the adapter is taken off."""
    import copy

    with run.algorithm.model(run.task, run.state.public) as model:
        assert model is not None
        return {name: weight.detach() for name, weight in released(copy.deepcopy(model)).named_parameters()}


def test_in_32_bits_it_is_fedavg_of_the_vector_to_the_bit() -> None:
    ours, theirs = simulate(UNI, 3), simulate(FedAvg(training=ADAM), 3, task=toy_task(3, UNI))
    assert ours.public == theirs.public
    assert simulate(replace(UNI, bits=8), 3).public != ours.public
    slower, fedavg = replace(UNI, server_learning_rate=0.7), FedAvg(server_learning_rate=0.7, training=ADAM)
    assert simulate(slower, 3).public == simulate(fedavg, 3, task=toy_task(3, UNI)).public


def test_the_map_from_the_vector_to_the_factors_is_an_isometry() -> None:
    model = toy_task(1, UNI).model
    vector = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    for number in range(3):
        with torch.no_grad():
            vector.copy_(normal(Key.of(5, number), 30))
        assert float(flat(model).norm()) == pytest.approx(float(vector.norm()), rel=1e-6)
    counts = torch.bincount(
        torch.cat([m.get_buffer(f"uni_lora_places_{p}").view(-1) for m in (model[0], model[2]) for p in "ab"])
    )  # type: ignore[index]
    assert len(counts) == 30 and set(counts.tolist()) == {2, 3}  # of 74 values


def test_it_computes_what_peft_computes() -> None:
    """Peft's layers with our places, scales and vector."""
    import peft

    ours = toy_task(1, UNI).model
    with torch.random.fork_rng(devices=[]):
        config = peft.UniLoraConfig(r=2, theta_d_length=30, target_modules=["0", "2"])
        theirs = peft.get_peft_model(toy_model(), config)
    layers = [m for m in theirs.modules() if type(m).__module__ == "peft.tuners.unilora.layer" and hasattr(m, "r")]
    for layer, module in zip(layers, tuned_modules(ours).values(), strict=True):
        for part in "AB":
            getattr(layer, f"unilora_indices_{part}")["default"] = module.get_buffer(f"uni_lora_places_{part.lower()}")
            getattr(layer, f"unilora_scales_{part}")["default"] = module.get_buffer(f"uni_lora_scales_{part.lower()}")
        layer.unilora_theta_d["default"].data.copy_(module.get_parameter("uni_lora_vector").detach())
    inputs = normal(Key.of(5, "x"), 6, 4)
    assert not torch.allclose(ours(inputs), toy_model()(inputs), atol=1e-3)
    torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=1e-6, atol=1e-6)


def test_peft_reads_what_is_exported_and_a_merged_model_computes_the_same(tmp_path: Path) -> None:
    import peft

    adapter = adapters.UniLoRA(rank=2, values=50, bound=0.5)
    model = adapter.attach(toy_language_model(), Key.of(5, "uni"))
    words = torch.arange(6)[None]
    logits = model(input_ids=words).logits
    adapter.export(model, "base", tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(toy_language_model(), tmp_path / "adapter")
    torch.testing.assert_close(read(input_ids=words).logits, logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(toy_language_model()(input_ids=words).logits, logits, atol=1e-3)
    plain = released(model)
    torch.testing.assert_close(plain(input_ids=words).logits, logits, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in plain.named_parameters()] == [
        name for name, _ in toy_language_model().named_parameters()
    ]
    assert not list(plain.get_submodule("model.layers.0.self_attn.q_proj").buffers())


def test_what_is_impossible_is_one_line() -> None:
    with pytest.raises(UserError, match="values=75: the factors have 74 values in all"):
        toy_task(1, replace(UNI, values=75))
    for bound in (0, 1e-60, 1e38):
        with pytest.raises(UserError, match=re.escape(f"bound={bound}: must be from 0.000001 to 1")):
            UniLoRA(bound=bound)
    with pytest.raises(UserError, match="rank=5: 0 has a side of 4"):
        toy_task(1, replace(UNI, rank=5))
