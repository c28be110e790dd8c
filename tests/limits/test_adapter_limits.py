"""Where averaging adapters must become something simpler, and how far it is from what it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedit import FedIT, FedITSGD, product_gap
from fedferret.algorithms.fedprompt import FedPrompt
from fedferret.algorithms.fedptuning_v2 import FedPTuningV2
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from fedferret.models.adapters import adapter_of, factors, released
from toys import (
    TRAINING,
    Simulation,
    SquaredError,
    held_out_loss,
    simulate,
    toy_clients,
    toy_language_model,
    toy_model,
    toy_task,
)

if TYPE_CHECKING:
    import peft

ADAM = FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3, clip=None)
FEDIT = FedIT(rank=2, alpha=4, modules=("0", "2"), training=ADAM)


def by_hand(algorithm: Any, model: nn.Module, config: peft.PeftConfig) -> Task:
    """The toy task of ``algorithm``, on a model that peft alone made, with the same first values."""
    import peft

    task = toy_task(4, algorithm)
    with torch.random.fork_rng(devices=[]):
        if isinstance(config, peft.LoraConfig):
            made: nn.Module = peft.inject_adapter_in_model(config, model)
        else:
            made = peft.PeftModelForCausalLM(model, config)
    tree.copy_(tree.parameters(made), tree.parameters(task.model))
    made._fedferret_adapter = adapter_of(task.model)  # as our own way of attaching it leaves it
    return Task.of(made, task.objective, task.rounds)


def test_fedit_is_fedavg_on_a_lora_model_to_the_bit() -> None:
    import peft

    task = by_hand(FEDIT, toy_model(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    assert simulate(FedAvg(training=ADAM), 4, task=task).memory == simulate(FEDIT, 4).memory
    assert simulate(replace(FEDIT, alpha=2), 4).memory != simulate(FEDIT, 4).memory


def test_fedprompt_is_fedavg_on_a_prompt_to_the_bit() -> None:
    import peft

    fedprompt = FedPrompt(virtual_tokens=3, training=ADAM)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    task = by_hand(fedprompt, toy_language_model(), config)
    assert simulate(FedAvg(training=ADAM), 2, task=task).memory == simulate(fedprompt, 2).memory


def test_fedptuning_v2_is_fedavg_on_a_model_with_prefixes_to_the_bit() -> None:
    v2 = FedPTuningV2(virtual_tokens=3, training=ADAM)
    assert simulate(FedAvg(training=ADAM), 3, task=toy_task(3, v2)).memory == simulate(v2, 3).memory
    assert simulate(replace(v2, virtual_tokens=2), 3).loss() != simulate(v2, 3).loss() < toy_loss()


def toy_loss() -> float:
    """The language model's, before it is tuned."""
    with torch.no_grad():
        return held_out_loss(toy_task(1, FedPTuningV2()), toy_language_model())


def test_fedit_sgd_is_fedit_with_sgd_to_the_bit() -> None:
    same: dict[str, Any] = {"rank": 2, "alpha": 4, "modules": ("0", "2"), "training": TRAINING}
    assert simulate(FedITSGD(**same), 4).memory == simulate(FedIT(**same), 4).memory


def test_rslora_of_rank_1_is_lora_to_the_bit() -> None:
    plain = replace(FEDIT, rank=1)
    assert simulate(replace(plain, rslora=True), 3).memory == simulate(plain, 3).memory
    assert simulate(replace(FEDIT, rslora=True), 3).memory != simulate(FEDIT, 3).memory


def test_rslora_is_lora_of_another_alpha() -> None:
    """α / √4 is 2 α / 4."""
    rslora, plain = replace(FEDIT, rank=4, rslora=True), replace(FEDIT, rank=4, alpha=8)
    assert simulate(rslora, 3).memory == simulate(plain, 3).memory


def test_dora_begins_as_the_base_and_lora_with_its_magnitudes_at_the_norms() -> None:
    dora = toy_task(1, replace(FEDIT, dora=True)).model
    inputs = torch.linspace(-1, 1, 20).view(5, 4)
    torch.testing.assert_close(dora(inputs), toy_model()(inputs), rtol=1e-6, atol=1e-6)
    for name in ("0", "2"):
        weight, found = toy_model().get_parameter(f"{name}.weight"), dict(dora.named_parameters())
        magnitude = found[f"{name}.lora_magnitude_vector.default.weight"]
        assert magnitude.requires_grad
        torch.testing.assert_close(magnitude, weight.norm(dim=1), rtol=1e-6, atol=0)


def test_fedit_with_every_module_dense_is_fedavg_of_these_modules() -> None:
    """With rank 1 on one module and nothing learned there, what is dense has FedAvg's bits."""
    whole = toy_model()
    for name, weight in whole.named_parameters():
        weight.requires_grad_(name.startswith("2."))
    theirs = simulate(FedAvg(training=ADAM), 3, task=Task.of(whole, SquaredError(), 3))
    ours = simulate(replace(FEDIT, modules=("0",), modules_to_save=("2",)), 3, task=frozen_factors())
    for name, weight in theirs.state.public.weights.items():
        assert torch.equal(ours.state.public.weights[name], weight)


def frozen_factors() -> Task:
    """The toy task with LoRA factors that are not trained, and the second layer dense."""
    task = toy_task(3, replace(FEDIT, modules=("0",), modules_to_save=("2",)))
    for pair in factors(task.model).values():
        for factor in pair:
            factor.requires_grad_(False)
    return task


def test_full_rank_on_a_frozen_identity_is_fedavg_of_the_weights() -> None:
    """With A the identity and α = r, B has the gradient of W: gradient steps on the one are steps on the other."""
    training = FirstOrder(learning_rate=0.1, steps=3, clip=None)
    fedit = FedITSGD(rank=4, alpha=4, modules=("0",), freeze_a=True, training=training)
    low_rank = toy_task(4, fedit)
    for a, _ in factors(low_rank.model).values():
        a.data.copy_(torch.eye(4))
    whole = toy_model()
    for name, weight in whole.named_parameters():
        weight.requires_grad_(name == "0.weight")
    ours = simulate(fedit, 4, task=low_rank)
    theirs = simulate(FedAvg(training=training), 4, task=Task.of(whole, SquaredError(), 4))
    with ours.algorithm.model(ours.task, ours.state.public) as model:
        assert model is not None
        tuned = dict(released(model).named_parameters())["0.weight"]
    expected = theirs.state.public.weights["0.weight"]
    torch.testing.assert_close(tuned.detach(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, toy_model().get_parameter("0.weight"), atol=1e-2)


def trained(run: Simulation) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Every client's factors after its local training in the next round."""
    found = []
    for client, rows in run.data.items():
        run.algorithm.client_update(run.task, run.state.public, None, rows, Key.of(1, client))
        pairs = factors(run.task.model)
        found.append({name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in pairs.items()})
    return found


def test_the_mean_of_the_factors_is_not_the_mean_of_the_products() -> None:
    clients = trained(simulate(FEDIT, 4, until=1))
    weights = [float(len(rows)) for rows in toy_clients().values()]
    gap = product_gap(clients, weights)
    assert 1e-3 < gap < 1
    assert product_gap(clients[::-1], weights[::-1]) == pytest.approx(gap)
    assert product_gap(clients, [10 * weight for weight in weights]) == pytest.approx(gap)
    assert product_gap(clients, [1.0, 0.0, 0.0]) == 0


def test_with_a_frozen_the_mean_of_the_factors_is_the_mean_of_the_products() -> None:
    clients = trained(simulate(replace(FEDIT, freeze_a=True), 4, until=1))
    assert not torch.equal(clients[0]["0"][1], clients[1]["0"][1])
    assert product_gap(clients, [9, 12, 15]) < 1e-12


def test_the_gap_of_two_opposite_clients_is_all_there_is() -> None:
    one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0]])
    assert product_gap([{"w": (one, other)}, {"w": (-one, -other)}], [1, 1]) == 1  # both products are 6, both means 0
    # products 6 and 0, mean 3; mean factors 2 and 1.5, product 3
    assert product_gap([{"w": (one, other)}, {"w": (one, 0 * other)}], [1, 1]) == 0
    # products 6 and 6, mean 6; mean factors 1.5 x (3 + 6) / 2 = 6.75
    assert product_gap([{"w": (one, other)}, {"w": (one / 2, 2 * other)}], [1, 1]) == pytest.approx(0.75 / 6)
