"""Scales and shifts: the base to the bit at first, merged exactly into plain architectures, or refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedferret import models
from fedferret.algorithms.ssf import SSF
from fedferret.build import check
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.experiment import Experiment
from fedferret.export import apply_delta, export_delta, export_folder
from fedferret.models import adapters
from fedferret.models.loading import hold_in_bf16
from fedferret.runner import run
from tiny_runs import silent, tiny_recipe
from unit.tiny_adapters import base
from unit.tiny_architectures import ARCHITECTURES, tiny_instance

pytestmark = pytest.mark.usefixtures("no_plots")

KEY = Key.of(5, "prepare")
IDS = (torch.arange(24) * 7 % 250 + 3).view(2, 12)
FEW = ("gpt2", "llama", "gemma", "falcon")  # Conv1D; biases by two keys; 1 + weight; a linear module of its own kind


def logits(model: Any) -> Tensor:
    said: Tensor = model(input_ids=IDS, use_cache=False).logits
    return said


def moved(model: nn.Module, size: float = 0.3) -> nn.Module:
    """The model with scales and shifts that say something."""
    with torch.no_grad():
        for name, weight in tree.parameters(model).items():
            weight.add_(size * (KEY.fold(name).uniform(weight.numel()).float().view_as(weight) - 0.5))
    return model


def loads_as_plain(model: Any) -> Any:
    """What transformers makes of the model's configuration, with the model's weights; every name must fit."""
    again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    again.load_state_dict(model.state_dict())
    return again.eval()


@pytest.mark.parametrize(
    ("architecture", "shift"),
    [
        *((name, "auto") for name in FEW),
        ("llama", "pushed"),
        ("gemma", "pushed"),
        *(pytest.param(name, "auto", marks=pytest.mark.slow(seconds=30)) for name in ARCHITECTURES if name not in FEW),
        *(
            pytest.param(name, "pushed", marks=pytest.mark.slow(seconds=30))
            for name in ("smollm3", "granite", "qwen2", "qwen3")
        ),
    ],
)
def test_it_begins_as_the_base_and_is_merged_exactly(architecture: str, shift: adapters.Shift) -> None:
    """Every scale and shift has an effect, and none is lost."""
    model = tiny_instance(architecture)
    with torch.no_grad():
        untuned = logits(model)
    attached = adapters.ScaleShift(shift=shift).attach(model, KEY)
    assert torch.equal(logits(attached), untuned)
    assert all(".ssf_" in name for name in tree.parameters(attached))
    tuned = logits(moved(attached))
    tuned.square().mean().backward()  # type: ignore[no-untyped-call]
    assert [name for name, each in attached.named_parameters() if each.requires_grad and not each.grad.any()] == []
    with torch.no_grad():
        plain = loads_as_plain(adapters.released(attached))
        scale = float(tuned.abs().max())
        torch.testing.assert_close(logits(plain), tuned, rtol=0, atol=1e-5 * max(1.0, scale / 2))
    assert not torch.allclose(untuned, tuned, atol=0.1)


def count(model: nn.Module, **settings: Any) -> int:
    return tree.size(tree.parameters(adapters.ScaleShift(**settings).attach(model, KEY)))


def test_the_trainable_count_is_the_formulas() -> None:
    """γ and β of all outputs; a Llama's norms have no place for β, and Qwen2 has one for q, k and v."""
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    llama = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    qwen = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=64,
    )
    with torch.device("meta"):
        assert count(BertModel(BertConfig()), shift="all") == 204_288
        assert count(GPT2LMHeadModel(GPT2Config()), shift="all") == 204_288
        assert count(LlamaForCausalLM(llama)) == 888_832 - 33 * 2048
        assert count(LlamaForCausalLM(llama), shift="pushed") == 888_832 - 2048  # the head has no bias
        assert count(LlamaForCausalLM(llama), shift="none") == 888_832 // 2
        assert count(Qwen2ForCausalLM(qwen)) == 696_064 // 2 + 24 * (896 + 128 + 128)


def test_detaching_leaves_the_base_to_the_bit_and_a_bf16_base_has_fp32_scales() -> None:
    plain, model = base(), base()
    for each in (plain, model):
        hold_in_bf16(each)
    attached = moved(adapters.ScaleShift(initial="normal").attach(model, KEY))
    assert {weight.dtype for weight in tree.parameters(attached).values()} == {torch.float32}
    assert logits(attached).dtype == torch.bfloat16
    adapter = adapters.adapter_of(attached)
    assert adapter is not None
    detached = adapter.detach(attached)
    assert tree.fingerprint(dict(detached.named_parameters())) == tree.fingerprint(dict(plain.named_parameters()))
    assert torch.equal(logits(detached), logits(plain))


def test_first_values_are_the_papers_and_follow_from_the_key() -> None:
    """Two-sided: two thirds and three halves of the deviation are refused."""
    before = torch.get_rng_state()
    one, again, other = (
        tree.parameters(adapters.ScaleShift(initial="normal").attach(base(), key)) for key in (KEY, KEY, Key.of(6))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert tree.fingerprint(one) == tree.fingerprint(again) != tree.fingerprint(other)
    for part, mean in (("scale", 1.0), ("shift", 0.0)):
        values = torch.cat([each for name, each in one.items() if name.endswith(part)])
        assert abs(float(values.mean()) - mean) < 4 * 0.02 / math.sqrt(len(values))
        assert 0.017 < float(values.std()) < 0.023


def test_a_quantised_base_is_trained_unmerged_and_its_codes_are_not_scaled(tmp_path: Path) -> None:
    """An export merges into the checkpoint's own weights."""
    from transformers import AutoModelForCausalLM

    algorithm = {"name": "ssf", "training": {"learning_rate": 0.05, "steps": 2}}
    model = {"quantised": "4-bit", "dtype": "bf16"}
    recipe = tiny_recipe(tmp_path, rounds=1, algorithm=algorithm, model=model)
    losses = run(recipe, tmp_path / "run", silent)["eval_loss"]
    assert losses[-1] < losses[0]
    experiment = Experiment.load(recipe, tmp_path / "run", silent)
    weights = experiment.initial_state().public.weights
    assert {each.dtype for each in weights.values()} == {torch.float32}
    with pytest.raises(UserError, match="are quantised, and merging would round them again"):
        recipe.algorithm.release(experiment.model)
    export_folder(tmp_path / "run", tmp_path / "model", silent, dtype="fp32")
    plain = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32").named_parameters())
    own = base()
    hold_in_bf16(own)
    name = "model.layers.1.mlp.down_proj"
    scaled = weights[f"{name}.ssf_scale"][:, None] * own.get_parameter(f"{name}.weight").float()
    torch.testing.assert_close(plain[f"{name}.weight"].detach(), scaled)
    assert torch.equal(plain[f"{name}.bias"].detach(), weights[f"{name}.ssf_shift"])


def test_a_shift_without_a_place_is_refused_rather_than_dropped() -> None:
    model: Any = adapters.ScaleShift(shift="pushed").attach(tiny_instance("llama"), KEY)
    model.config.model_type = "another"
    with pytest.raises(
        UserError, match=r"no place for the shift of model\.layers\.0\.input_layernorm: it would be lost"
    ):
        adapters.released(model)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"shift": "all"},
            r'shift="all": llama has no place for a shift of model\.layers\.0\.input_layernorm \(5 of 19',
        ),
        ({"shift": "half"}, "shift"),
        (
            {"modules": ["q_proj", "query"]},
            r'modules="query": no linear module of a block and no norm is called so; this',
        ),
        ({"modules": ["lm_head"]}, 'or modules = "all-linear", or leave the setting out'),
        ({"private_norms": True, "modules": "all-linear"}, "private_norms=true: no norm is tuned"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(settings: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        check(tiny_recipe(tmp_path, algorithm={"name": "ssf", **settings}))
    assert "\n" not in str(refused.value)


def test_what_an_architecture_has_not_is_refused() -> None:
    with pytest.raises(UserError, match=r'shift="pushed": no norm of gpt2 is read by modules that can all have a bias'):
        SSF(shift="pushed").prepare(tiny_instance("gpt2"), KEY)
    with pytest.raises(UserError, match="no linear module or norm that could be scaled"):
        SSF().prepare(nn.Sequential(nn.Conv1d(2, 2, 1)), KEY)


def test_a_run_is_exported_as_a_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    algorithm = {"name": "ssf", "training": {"learning_rate": 0.05, "steps": 3}}
    recipe = tiny_recipe(tmp_path, rounds=2, algorithm=algorithm)
    losses = run(recipe, tmp_path / "run", silent)["eval_loss"]
    assert losses[-1] < losses[0] - 0.1
    experiment = Experiment.load(recipe, tmp_path / "run", silent)
    state = experiment.initial_state()
    with recipe.algorithm.model(experiment.task, state.public) as tuned, torch.no_grad():
        expected = logits(tuned)
    export_folder(tmp_path / "run", tmp_path / "model", silent)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32").eval()
    assert plain.config.attention_bias and plain.config.mlp_bias
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    export_delta(tmp_path / "run", tmp_path / "delta", silent)
    apply_delta("tiny", tmp_path / "delta", tmp_path / "again", silent)
    again, first = (tmp_path / folder / "model.safetensors" for folder in ("again", "model"))
    assert again.read_bytes() == first.read_bytes()
    with pytest.raises(UserError, match="no other program reads scales and shifts alone"):
        export_folder(tmp_path / "run", tmp_path / "alone", silent, adapter_alone=True)


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny"])
def test_a_classifier_is_tuned_with_its_head_and_saved_for_plain_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    loaded = models.classifier(name, 3)
    attached: Any = moved(SSF().prepare(loaded.model, KEY))
    tuned = tree.parameters(attached)
    assert {part for each in tuned if (part := each.rpartition(".")[0]).startswith("head")} == {"head"}
    assert not any("pooler" in each for each in tuned)
    assert any(each.startswith("encoder.embeddings.LayerNorm.ssf_norm_") for each in tuned) == (name == "tiny-encoder")
    tokenizer: Any = loaded.tokenizer
    rows = tokenizer(["a text", "another text, which is longer"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = attached(rows)
        adapters.released(attached)
        models.save_classifier(loaded, ("a", "b", "c"), tmp_path / "model")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(plain(**rows).logits, expected, rtol=1e-4, atol=1e-5)
