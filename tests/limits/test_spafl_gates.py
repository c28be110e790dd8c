"""SpaFL's gates: open ones leave the model as it is, closed ones are removed neurons and heads."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from contract.methods import METHODS
from fedferret import models
from fedferret.algorithms.spafl_gates import SpaFLGates
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models import adapters
from toys import Rows, held_out_loss, normal, sentences, simulate, toy_language_model, toy_task

KEY = Key.of(1)


def logits(model: Any) -> torch.Tensor:
    """Of five short sentences."""
    rows = Rows(normal(KEY, 5, 4), normal(KEY.fold("y"), 5, 1))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=sentences(rows).input_ids).logits
    return found


def test_open_gates_leave_the_base_as_it_is_and_closed_ones_are_removed_neurons_and_heads() -> None:
    base = toy_language_model().eval()
    model: Any = adapters.Gates().attach(deepcopy(base), KEY)
    assert torch.equal(logits(model), logits(base))
    assert {name: len(each) for name, each in tree.parameters(model).items()} == {
        "model.layers.0.self_attn.o_proj.gate_threshold": 2,
        "model.layers.0.mlp.down_proj.gate_threshold": 8,
    }
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.gate_threshold[3] = 1.0
        model.model.layers[0].self_attn.o_proj.gate_threshold[1] = 2.0
    removed: Any = deepcopy(base)
    layer = removed.model.layers[0]
    with torch.no_grad():
        for rows in (layer.mlp.gate_proj.weight[3], layer.mlp.up_proj.weight[3], layer.self_attn.v_proj.weight[4:]):
            rows.zero_()
    torch.testing.assert_close(logits(model), logits(removed))
    assert not torch.allclose(logits(model), logits(base), atol=1e-3)
    assert adapters.open_share(model) == pytest.approx((64 * 7 / 8 + 64 * 1 / 2) / 128)
    expected = logits(model)
    merged = adapters.released(model)
    torch.testing.assert_close(logits(merged), expected)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]


@pytest.mark.parametrize("window", ["all", "unit", "inverted"])
def test_a_gate_has_the_gradient_of_what_passes_it(window: Any) -> None:
    task = toy_task(1, SpaFLGates(window=window, initial_threshold=0.5))
    loss = task.objective.loss(task.model, Rows(normal(KEY, 9, 4), normal(KEY.fold("y"), 9, 1)))
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: each.grad.clone() for name, each in task.model.named_parameters() if each.grad is not None}
    assert all(name.endswith(adapters.GATE) for name in found) and len(found) == 2
    for name, module in adapters.gated_modules(task.model).items():
        weight: Any = module.weight.detach().requires_grad_(True)
        again = torch.func.functional_call(task.model, {f"{name}.weight": weight}, (), _inputs(task))
        nn.functional.cross_entropy(again.logits[:, -2], _targets(task)).backward()
        by_unit = (weight.grad * weight).sum(dim=0).view(len(getattr(module, adapters.GATE)), -1).sum(dim=1)
        wanted = -by_unit if window != "inverted" else torch.zeros_like(by_unit)
        torch.testing.assert_close(found[f"{name}.{adapters.GATE}"], wanted, atol=1e-6, rtol=1e-4)
        assert bool(found[f"{name}.{adapters.GATE}"].any()) == (window != "inverted")


def _inputs(task: Any) -> dict[str, Any]:
    rows = sentences(Rows(normal(KEY, 9, 4), normal(KEY.fold("y"), 9, 1)))
    return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}


def _targets(task: Any) -> torch.Tensor:
    return sentences(Rows(normal(KEY, 9, 4), normal(KEY.fold("y"), 9, 1))).input_ids[:, -1]


def test_training_closes_gates_that_harm_the_loss_and_the_run_says_so() -> None:
    method = replace(METHODS["spafl-gates"], alpha=0.0)
    run = simulate(method, 4)
    note = run.algorithm.note(run.state.public)
    assert note is not None and note.endswith("of 10 gates are open")
    assert run.algorithm.note(simulate(method, 4, until=1).state.public) is None
    with run.algorithm.model(run.task, run.state.public) as model:  # all clients have the same frozen weights
        assert model is not None and held_out_loss(run.task, model) < 0.97 * held_out_loss(
            run.task, toy_language_model()
        )


def test_a_classifiers_head_is_trained_and_shared_unless_it_is_private() -> None:
    skeleton = models.classifier_skeleton("tiny-encoder", 3)
    names = list(tree.parameters(SpaFLGates().prepare(skeleton, KEY)))
    assert sum(name.endswith(adapters.GATE) for name in names) == len(names) - 2
    assert SpaFLGates().shares(names) == names
    assert SpaFLGates(private_head=True).shares(names) == names[:-2]


def test_other_architectures_have_gates_or_are_refused() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig

    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    for config, neurons in (
        (GPT2Config(vocab_size=8, n_embd=8, n_head=2, n_layer=2, n_inner=12), 12),
        (GPTNeoXConfig(intermediate_size=12, **sizes), 12),
        (OPTConfig(ffn_dim=12, word_embed_proj_dim=8, **sizes), 12),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        found = tree.parameters(adapters.Gates().attach(model, KEY))
        assert sorted(len(each) for each in found.values()) == [2, 2, neurons, neurons], config.model_type
    with pytest.raises(UserError, match="has no projection behind each layer's neurons and heads"):
        SpaFLGates().prepare(models.classifier_skeleton("lenet5", 3), KEY)
