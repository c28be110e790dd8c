"""Runs that tuned an adapter, at hand-over: a plain model, or an adapter that the peft library reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from fedferret import models
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.experiment import Experiment
from fedferret.export import apply_delta, export_delta, export_folder
from fedferret.models import adapters
from fedferret.runner import run
from tiny_runs import silent, tiny_recipe
from unit.tiny_adapters import METHODS, base, batch


def finished(folder: Path, name: str, model: str = "tiny") -> Path:
    """The folder of a run that has ended, with factors that say something."""
    algorithm = {"name": name, "training": {"learning_rate": 0.05, "steps": 3}}
    run(tiny_recipe(folder, rounds=2, algorithm=algorithm, model={"name": model}), folder / "run", silent)
    return folder / "run"


def tuned_logits(run: Path, ids: Tensor) -> Tensor:
    """What the run's own model says after the words ``ids``."""
    from fedferret.config import load

    experiment = Experiment.load(load(run / "recipe.toml"), run, silent)
    state = experiment.initial_state()
    with experiment.recipe.algorithm.model(experiment.task, state.public) as model, torch.no_grad():
        assert model is not None
        logits: Tensor = model(input_ids=ids).logits
    return logits


def test_lora_is_exported_as_a_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run_folder, ids = finished(tmp_path, "fedit"), batch().input_ids
    fingerprint = export_folder(run_folder, tmp_path / "model", silent)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in base().named_parameters()}
    expected = tuned_logits(run_folder, ids)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base()(input_ids=ids).logits, expected, atol=1e-2)
    delta = export_delta(run_folder, tmp_path / "delta", silent)
    assert delta.fingerprint == fingerprint
    assert apply_delta("tiny", tmp_path / "delta", tmp_path / "again", silent) == fingerprint
    again, first = (tmp_path / name / "model.safetensors" for name in ("again", "model"))
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("name", ["fedptuning", "fedprompt"])
def test_a_prompt_is_exported_as_an_adapter(name: str, tmp_path: Path) -> None:
    run_folder, ids, said = finished(tmp_path, name), batch().input_ids, []
    export_folder(run_folder, tmp_path / "prompt", said.append)
    assert said[-1].startswith(f"{tmp_path / 'prompt'} holds a learned prompt, not a whole model")
    assert {path.name for path in (tmp_path / "prompt").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (tmp_path / "prompt" / "adapter_model.safetensors").stat().st_size < 4 * 20 * 64 + 500
    model = peft.PeftModel.from_pretrained(models.load("tiny").model, tmp_path / "prompt")
    expected = tuned_logits(run_folder, ids)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    untuned: Any = METHODS[name].prepare(base(), Key.of(1, "prepare"))
    assert not torch.allclose(untuned(input_ids=ids).logits, expected, atol=1e-3)
    export_delta(run_folder, tmp_path / "delta", silent)
    apply_delta("tiny", tmp_path / "delta", tmp_path / "again", silent)
    again, first = (tmp_path / folder / "adapter_model.safetensors" for folder in ("again", "prompt"))
    assert again.read_bytes() == first.read_bytes()


def test_a_model_without_an_adapter_merges_into_itself() -> None:
    model = base()
    assert adapters.released(model) is model


def test_another_base_is_refused_although_the_log_would_fit(tmp_path: Path) -> None:
    language_model = models.load("tiny")
    models.save_folder(language_model, tmp_path / "base")
    run_folder = finished(tmp_path, "fedit", str(tmp_path / "base"))
    recipe = tiny_recipe(tmp_path, rounds=2, algorithm={"name": "fedit"}, model={"name": str(tmp_path / "base")})
    export_delta(run_folder, tmp_path / "before", silent)
    with torch.no_grad():
        next(language_model.model.parameters())[0, 0] += 1e-3
    (tmp_path / "base").rename(tmp_path / "old")
    models.save_folder(language_model, tmp_path / "base")
    for refuse in (
        lambda: Experiment.load(recipe, run_folder, silent).initial_state(),
        lambda: export_folder(run_folder, tmp_path / "model", silent),
        lambda: export_delta(run_folder, tmp_path / "delta", silent),
    ):
        with pytest.raises(UserError, match=r"began from a base with SHA-256 .*, and this one has .*: give it"):
            refuse()
    with pytest.raises(UserError, match="belongs to the base"):
        apply_delta(str(tmp_path / "base"), tmp_path / "before", tmp_path / "model", silent)
    assert not (tmp_path / "model").exists() and not (tmp_path / "delta").exists()
