"""Frozen bases in 4 and 8 bits under an adapter: what is refused, that training works, and what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedferret import models
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.experiment import Experiment
from fedferret.export import apply_delta, export_delta, export_folder
from fedferret.models.quantised import quantise
from fedferret.runner import run
from fedferret.tracking.events import read
from tiny_runs import silent, tiny_recipe

FEDIT = {"name": "fedit", "training": {"learning_rate": 0.02, "steps": 4}}
DRAWN = {"name": "fed-sb", "rank": 2, "initialisation": "random"}


@pytest.mark.parametrize(
    ("model", "algorithm", "reason"),
    [
        ({"quantised": "4-bit"}, {"name": "fedavg"}, 'model.quantised="4-bit": fedavg tunes the model\'s own weights'),
        ({"quantised": "8-bit"}, {"name": "ferret"}, "8 bits take no small steps; leave quantised out, or choose"),
        ({"quantised": "2-bit"}, FEDIT, "quantised"),
        ({"quantised": "4-bit"}, {**FEDIT, "dora": True}, "norms of the weights"),
        ({"dtype": "bf16"}, {"name": "fedkseed"}, 'far less than bf16\'s rounding step; set dtype="fp32"'),
        ({"dtype": "bf16"}, {"name": "fedmezo"}, "fedmezo changes weights by far less"),
        ({"dtype": "fp16"}, {"name": "fedavg"}, "dtype"),
        ({"quantised": "4-bit"}, DRAWN, "fed-sb has stages, which hold weights in fp32; leave it out, or choose"),
        ({"dtype": "bf16"}, DRAWN, "fed-sb has stages, which hold weights in fp32; leave it out, or choose"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    model: dict[str, Any], algorithm: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_weights(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(models, "load", read_weights)
    with pytest.raises(UserError) as refused:
        Experiment.load(tiny_recipe(tmp_path, algorithm=algorithm, model=model), log=silent)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    changes = {"objective": {"name": "classification", "classes": ["a", "b"]}, "algorithm": {"name": "fedavg"}}
    with pytest.raises(UserError, match=r'model.dtype="bf16": objective "classification" has fp32 weights alone'):
        Experiment.load(tiny_recipe(tmp_path, model={"dtype": "bf16"}, **changes), log=silent)


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_fedit_learns_over_a_quantised_base_and_is_merged_into_the_checkpoints_own_weights(
    kind: str, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, rounds=2, algorithm=FEDIT, model={"quantised": kind})
    losses = run(recipe, tmp_path / "run", silent)["eval_loss"]
    assert losses[-1] < losses[0] - 0.1
    base = models.load("tiny").model
    assert read(tmp_path / "run").start["base"] == tree.fingerprint(tree.parameters(base))  # before it was quantised
    experiment = Experiment.load(recipe, tmp_path / "run", silent)
    dtypes = {name: weight.dtype for name, weight in experiment.model.named_parameters()}
    assert {dtypes[name] for name in dtypes if name.endswith("proj.base_layer.weight")} == {
        torch.uint8 if kind == "4-bit" else torch.int8
    }
    assert {weight.dtype for weight in tree.parameters(experiment.model).values()} == {torch.float32}
    node = experiment.initial_state().node
    said: list[str] = []
    export_folder(tmp_path / "run", tmp_path / "model", said.append)
    assert f"tuned over a {kind} base; it is merged into the checkpoint's own weights" in said[0]
    from transformers import AutoModelForCausalLM

    exported = tree.parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32"))
    own = tree.parameters(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = node.public.weights
    a, b = (factors[name.replace(".weight", f".lora_{each}.default.weight")] for each in "AB")
    torch.testing.assert_close(exported[name], own[name] + 2 * b @ a)
    assert torch.equal(exported["model.embed_tokens.weight"], own["model.embed_tokens.weight"])
    export_delta(tmp_path / "run", tmp_path / "tuned.delta", silent)
    apply_delta("tiny", tmp_path / "tuned.delta", tmp_path / "again", silent)
    again, first = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "model"))
    assert again == first


def test_a_prompt_is_tuned_over_a_4_bit_base_in_bf16(tmp_path: Path) -> None:
    model = {"quantised": "4-bit", "dtype": "bf16"}
    recipe = tiny_recipe(tmp_path, rounds=1, algorithm={"name": "fedprompt"}, model=model)
    losses = run(recipe, tmp_path / "run", silent)["eval_loss"]
    assert losses[-1] < losses[0]


@pytest.mark.slow(seconds=50)
def test_a_4_bit_smollm2_learns_and_its_layers_take_an_eighth(tmp_path: Path) -> None:
    dense = models.load("packaged:smollm2").model
    layers = "model.layers"
    before = sum(each.numel() * each.element_size() for each in dense.get_submodule(layers).parameters())
    quantise(dense, "4-bit")
    state = dense.get_submodule(layers).state_dict()
    assert sum(each.numel() * each.element_size() for each in state.values()) < before / 7  # codes, scales and norms
    changes = {"model": {"name": "packaged:smollm2", "quantised": "4-bit"}, "text": {"max_tokens": 48}}
    algorithm = {"name": "fedit", "training": {"learning_rate": 1e-3, "steps": 2, "batch_size": 2}}
    recipe = tiny_recipe(tmp_path, rounds=1, clients={"per_round": 1}, algorithm=algorithm, **changes)
    losses = run(recipe, tmp_path / "run", silent)["eval_loss"]
    assert losses[-1] < losses[0] - 1, json.dumps(losses)
