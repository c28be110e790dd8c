"""A sparse client's model is exported with masked rows as zeros, and zero rows are removed with equal logits."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedferret import models
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.estimate import estimate
from fedferret.experiment import Experiment
from fedferret.export import export_folder
from fedferret.models import adapters
from fedferret.models.pruning import without_zero_rows
from fedferret.runner import run
from fedferret.tracking.report import write_report
from tiny_runs import silent
from unit.classifying import one_line
from unit.test_classification_runs import WORDS, resolved
from unit.test_classifier_export import example


@torch.no_grad()
def sparse(name: str) -> tuple[models.LoadedClassifier, Any]:
    """An image model of which two thirds of the rows are masked, of the second layer all; and three images."""
    loaded = models.classifier(name, 4)
    model = adapters.RowThresholds().attach(loaded.model, Key.of(0))
    for number, module in enumerate(adapters.masked_modules(model).values()):
        magnitudes = module.weight.flatten(1).abs().mean(dim=1)
        module.row_threshold.copy_(magnitudes.quantile(2 / 3) if number != 1 else magnitudes.max())
        if module.bias is not None:
            module.bias.copy_(0.1 * torch.arange(len(module.bias)))  # a masked row's bias is masked too
    return loaded, SimpleNamespace(pixels=Key.of(1).uniform(3 * 784).float().view(3, 1, 28, 28))


@pytest.mark.parametrize("name", ["lenet5", "conv4"])
def test_masked_rows_are_removed_with_equal_logits_and_the_smaller_model_is_loaded_by_its_example(
    name: str, tmp_path: Path
) -> None:
    loaded, images = sparse(name)
    with torch.no_grad():
        masked = loaded.model(images)
        rows = {
            each: int(adapters.row_mask(module).sum()) for each, module in adapters.masked_modules(loaded.model).items()
        }
        plain = adapters.released(deepcopy(loaded.model))
        torch.testing.assert_close(plain(images), masked)
        smaller = without_zero_rows(plain)
        torch.testing.assert_close(smaller(images), masked, atol=1e-5, rtol=1e-5)
    left = {each: len(smaller.get_submodule(each).weight) for each in rows}  # type: ignore[arg-type]
    assert left == {each: max(1, count) for each, count in rows.items()} and min(rows.values()) == 0
    assert tree.size(dict(smaller.named_parameters())) < tree.size(dict(plain.named_parameters())) / 3
    assert [type(each) for each in smaller.modules()] == [type(each) for each in plain.modules()]
    models.save_classifier(replace(loaded, model=smaller), "abcd", tmp_path / "out")
    names = {"folder": tmp_path / "out", "images": images.pixels}
    torch.testing.assert_close(example(tmp_path / "out" / "README.md", names), masked, atol=1e-5, rtol=1e-5)


def test_models_whose_zero_rows_cannot_be_removed_are_named() -> None:
    assert "without --prune" in one_line(lambda: without_zero_rows(models.classifier("tiny-encoder", 3).model))
    body = models.classifier("lenet5", 3).model
    body.body[1] = torch.nn.Sigmoid()  # type: ignore[index]
    assert "relu1 does not make 0 of 0" in one_line(lambda: without_zero_rows(body))


def test_a_clients_own_model_is_exported(tmp_path: Path) -> None:
    algorithm = {"name": "spafl", "alpha": 0.2, "training": {"learning_rate": 0.1, "steps": 2, "batch_size": 4}}
    recipe = resolved(tmp_path, rounds=2, algorithm={**algorithm, "initial_threshold": 0.01})
    cost = estimate(recipe)
    assert f" {cost.parameters:,} of {cost.parameters:,}, and {cost.tuned - cost.parameters:,} that" in str(cost)
    summary = run(recipe, tmp_path / "run", silent)
    assert all(0 < share < 1 for share in summary["density_by_round"]) and len(summary["density_by_round"]) == 2
    report = write_report(tmp_path / "run").read_text()
    assert "--client NAME --to" in report and "--delta" not in report
    assert "Density is the share of weights" in report and f"{summary['density_by_round'][-1]:.1%}" in report
    with pytest.raises(UserError, match="spafl has no global model: export a client's own, with --client NAME"):
        export_folder(tmp_path / "run", tmp_path / "model", silent)
    with pytest.raises(UserError, match=r"--client nobody: no client of .*; those that have are c0, c1"):
        export_folder(tmp_path / "run", tmp_path / "model", silent, client="nobody")
    with pytest.raises(UserError, match=r"--client c1x: no client of .*; near it are c1"):
        export_folder(tmp_path / "run", tmp_path / "model", silent, client="c1x")
    export_folder(tmp_path / "run", tmp_path / "model", silent, client="c1")
    with pytest.raises(UserError, match="not from a TextClassifier: export it without --prune"):
        export_folder(tmp_path / "run", tmp_path / "pruned", silent, client="c1", prune=True)
    experiment = Experiment.load(recipe, tmp_path / "run", silent)
    state = experiment.initial_state()
    store: Any = experiment.engine(state)
    private = store._store.get("c1")
    texts = [f"the {word[0]}" for word in WORDS.values()]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    given = AutoTokenizer.from_pretrained(tmp_path / "model")(texts, padding=True, return_tensors="pt")
    with torch.no_grad(), recipe.algorithm.model(experiment.task, state.public, private) as model:
        assert model is not None and adapters.density(model) < 1
        expected = model(given)
        exported: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        found = exported(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for path in (tmp_path / "run" / "state" / "clients").glob("*.state"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"--client c1: its state is not in .*; where sites hold the data, it is at the"
    ):
        export_folder(tmp_path / "run", tmp_path / "gone", silent, client="c1")
