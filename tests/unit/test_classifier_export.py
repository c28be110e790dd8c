"""A saved classifier loads in plain transformers, or by the example that is saved with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fedferret.models as models
from fedferret.core.keys import Key
from fedferret.models.tiny import tiny_encoder_tokenizer
from unit.classifying import LONG, SHORT, logits, one_line, tokens

CLASSES = ["bad", "good", "neither"]


def tuned(name: str, pooling: str | None, classes: int = len(CLASSES)) -> models.LoadedClassifier:
    """A classifier with a bias that is not zero, so that a forgotten one shows."""
    loaded = models.classifier(name, classes, pooling)
    if loaded.model.head.bias is not None:
        torch.nn.init.constant_(loaded.model.head.bias[0], 0.5)
    return loaded


@pytest.mark.parametrize(("name", "pooling"), [("tiny", "last"), ("tiny-encoder", "cls")])
def test_plain_transformers_loads_a_saved_text_classifier_with_its_labels(
    name: str, pooling: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    loaded = tuned(name, pooling)
    line = models.save_classifier(loaded, CLASSES, tmp_path / "out")
    assert "AutoModelForSequenceClassification" in line and "\n" not in line
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {name: index for index, name in enumerate(CLASSES)}
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")([SHORT, LONG], padding=True, return_tensors="pt")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model(**given).logits
    torch.testing.assert_close(found, logits(loaded, tokens(loaded, SHORT, LONG)), atol=1e-5, rtol=1e-5)


def example(readme: Path, names: dict[str, Any]) -> torch.Tensor:
    """Run the example of a README.md, which is five lines after its imports."""
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(code.split("\n\n")[1].strip().splitlines()) <= 5
    with torch.no_grad():
        exec(code, names)
    logits: torch.Tensor = names["logits"]
    return logits


@pytest.mark.parametrize(("name", "pooling"), [("tiny", "mean"), ("tiny-encoder", "mean"), ("tiny-encoder", "last")])
def test_the_example_joins_an_encoder_and_a_head_that_transformers_has_no_class_for(
    name: str, pooling: str, tmp_path: Path
) -> None:
    loaded = tuned(name, pooling)
    assert "README.md" in models.save_classifier(loaded, CLASSES, tmp_path / "out")
    found = example(tmp_path / "out" / "README.md", {"folder": tmp_path / "out", "texts": [SHORT, LONG]})
    torch.testing.assert_close(found, logits(loaded, tokens(loaded, SHORT, LONG)), atol=1e-5, rtol=1e-5)
    assert all(name in (tmp_path / "out" / "README.md").read_text() for name in CLASSES)


def test_the_example_loads_a_saved_image_classifier(tmp_path: Path) -> None:
    from safetensors import safe_open

    loaded = tuned("lenet5", None)
    assert "README.md" in models.save_classifier(loaded, CLASSES, tmp_path / "out")
    batch = SimpleNamespace(pixels=Key.of(3).uniform(2 * 64).float().view(2, 1, 8, 8))
    found = example(tmp_path / "out" / "README.md", {"folder": tmp_path / "out", "images": batch.pixels})
    assert torch.equal(found, logits(loaded, batch))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["architecture"] == "lenet5" and json.loads(file.metadata()["classes"]) == CLASSES


def test_a_model_whose_class_has_more_layers_in_its_head_is_written_apart(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=259, dim=32, hidden_dim=64, n_layers=1, n_heads=2, max_position_embeddings=64)
    with torch.random.fork_rng():
        DistilBertModel(config).save_pretrained(tmp_path / "base")
    tiny_encoder_tokenizer().save_pretrained(tmp_path / "base")
    loaded = tuned(str(tmp_path / "base"), None)
    assert loaded.pooling == "cls"
    models.save_classifier(loaded, CLASSES, tmp_path / "out")
    found = example(tmp_path / "out" / "README.md", {"folder": tmp_path / "out", "texts": [SHORT, LONG]})
    torch.testing.assert_close(found, logits(loaded, tokens(loaded, SHORT, LONG)), atol=1e-5, rtol=1e-5)


def test_nothing_is_overwritten_and_the_global_generator_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = torch.get_rng_state()
    for name in ("lenet5", "tiny-encoder"):
        assert "nothing is overwritten" in one_line(
            lambda name=name: models.save_classifier(tuned(name, None), CLASSES, tmp_path)
        )
        models.save_classifier(tuned(name, None), CLASSES, tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
