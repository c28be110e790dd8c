"""Activations that are recomputed: the same bits on every architecture, also where the base is frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedferret.build import check
from fedferret.config import from_tables
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from fedferret.models.adapters import ALL_LINEAR, LoRA
from fedferret.objectives.next_token import NextToken
from unit.test_steppers import Sentences
from unit.tiny_architectures import ARCHITECTURES, tiny_instance

SIZES: dict[str, Any] = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {  # dropout as they have it, and more
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.5},
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.5,
    },
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "qwen2_moe": {
        **LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def language_model(kind: str) -> nn.Module:
    """A small random model of that architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind]))
    return model.eval()


def trained(make: Callable[[], nn.Module], lora: bool, recomputed: bool) -> dict[str, Tensor]:
    """All weights after three steps."""
    model = make()
    if lora:
        model = LoRA(rank=2, alpha=4).attach(model, Key.of(1))
    training = FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3, checkpoint_activations=recomputed)
    training.check(model, "small")
    training.train(Task.of(model, NextToken(), 1), Sentences(8, 12), Key.of(1))
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_recomputed_activations_give_the_same_bits_on_every_architecture(kind: str, lora: bool) -> None:
    before = torch.get_rng_state()
    kept, again = (trained(lambda: language_model(kind), lora, each) for each in (False, True))
    assert torch.equal(torch.get_rng_state(), before)  # no dropout, which would draw
    assert all(torch.equal(weight, again[name]) for name, weight in kept.items())
    assert any("lora_B" in name and bool(weight.any()) for name, weight in kept.items()) == lora


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_recomputed_activations_give_the_same_bits_on_each_tiny_architecture(kind: str) -> None:
    model = tiny_instance(kind)
    kept, again = (trained(lambda: copy.deepcopy(model), True, each) for each in (False, True))
    assert all(torch.equal(weight, again[name]) for name, weight in kept.items())


def test_fewer_activations_wait_for_the_backward_pass() -> None:
    from fedferret.local.recomputing import recomputed

    sizes = []
    for enabled in (False, True):
        model, waiting = LoRA(rank=2, alpha=4, modules=ALL_LINEAR).attach(language_model("gpt2"), Key.of(1)), 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal waiting
            waiting += tensor.numel()
            return tensor

        with recomputed(model, enabled), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            NextToken().loss(model, next(Sentences(8, 12).batches(8, Key.of(1))))
        sizes.append(waiting)
    assert sizes[1] < sizes[0] / 2
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_model_that_cannot_recompute_is_refused_before_any_work() -> None:
    training = {"checkpoint_activations": True}
    tables = {"data": {"source": "digits"}, "algorithm": {"name": "fedavg", "training": training}}
    with pytest.raises(UserError, match=r"training\.checkpoint_activations=true: .* cannot .* \"lenet5\"") as raised:
        check(from_tables({"model": {"name": "lenet5"}, **tables}))
    assert "\n" not in str(raised.value)
