"""Saved folders: plain transformers loads the same bits, tied; nothing is overwritten or left half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedferret.models as models
from fedferret.core.errors import UserError


@pytest.fixture(scope="module")
def tiny() -> models.LanguageModel:
    """The tiny model, a little tuned, so that it differs from a fresh one."""
    loaded = models.load("tiny")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.125)
    return loaded


def test_plain_transformers_loads_the_same_bits_with_tied_weights(tiny: models.LanguageModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    models.save_folder(tiny, tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == 90_624
    assert all(torch.equal(parameters[name], ours) for name, ours in tiny.model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    turns = [{"role": "user", "content": "Grüße, 12 mal!"}]
    assert tokenizer.apply_chat_template(turns) == tiny.tokenizer.apply_chat_template(turns)
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 2


def test_saving_what_was_loaded_gives_the_same_model(tiny: models.LanguageModel, tmp_path: Path) -> None:
    models.save_folder(tiny, tmp_path / "first")
    again = models.load(str(tmp_path / "first"))
    models.save_folder(again, tmp_path / "second")
    assert again.folder == tmp_path / "first"
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_tuning_a_loaded_model_leaves_its_folder_alone(tiny: models.LanguageModel, tmp_path: Path) -> None:
    models.save_folder(tiny, tmp_path / "saved")
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in models.load(str(tmp_path / "saved")).model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before


def test_nothing_is_overwritten(tiny: models.LanguageModel, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    models.save_folder(tiny, taken)  # an empty folder is as good as none
    kept = (taken / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is not empty"):
        models.save_folder(tiny, taken)
    assert (taken / "model.safetensors").read_bytes() == kept
    with pytest.raises(UserError, match="is a file"):
        models.save_folder(tiny, taken / "config.json")


def test_a_save_that_fails_leaves_nothing(tiny: models.LanguageModel, tmp_path: Path) -> None:
    class FullDisk:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("no space left on device")

    broken = models.LanguageModel("tiny", tiny.model, FullDisk(), None)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no space"):
        models.save_folder(broken, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_a_saved_folder(tiny: models.LanguageModel, tmp_path: Path) -> None:
    models.save_folder(tiny, tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "saved").iterdir())
