"""LoRA variants in whole runs: what is exported, what is refused, and runs without a global model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedferret import models
from fedferret.build import check
from fedferret.core.errors import UserError
from fedferret.experiment import Experiment
from fedferret.export import apply_delta, export_delta, export_folder, read_delta
from fedferret.runner import run
from tiny_runs import silent, tiny_recipe
from unit.tiny_adapters import batch

pytestmark = pytest.mark.usefixtures("no_plots")

TRAINING = {"learning_rate": 0.01, "steps": 2}


def test_fedex_loras_moved_weights_are_exported_with_the_factors(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, rounds=2, algorithm={"name": "fedex-lora", "training": TRAINING})
    summary = run(recipe, tmp_path / "run", silent)
    assert summary["eval_loss"][-1] < summary["eval_loss"][0] - 0.05
    with pytest.raises(UserError, match="fedex-lora changes the weights under its adapter too, which no adapter holds"):
        export_folder(tmp_path / "run", tmp_path / "adapter", silent, adapter_alone=True)
    export_folder(tmp_path / "run", tmp_path / "model", silent)
    experiment = Experiment.load(recipe, tmp_path / "run", silent)
    state = experiment.initial_state()
    with torch.no_grad(), recipe.algorithm.model(experiment.task, state.public) as model:
        expected = model(input_ids=batch().input_ids).logits
        exported: Any = models.load(str(tmp_path / "model")).model
        torch.testing.assert_close(exported(input_ids=batch().input_ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_fedex_lora_over_quantised_weights_is_refused(tmp_path: Path) -> None:
    model = {"name": "tiny", "quantised": "4-bit"}
    with pytest.raises(UserError, match="fedex-lora changes the weights under its adapter too, and codes take no"):
        check(tiny_recipe(tmp_path, model=model, algorithm={"name": "fedex-lora"}))


def test_fedsa_lora_has_the_figures_of_its_clients_and_no_model_to_export(tmp_path: Path) -> None:
    algorithm = {"name": "fedsa-lora", "training": TRAINING}
    clients = {"per_round": 4, "held_out": 0.2}
    recipe = tiny_recipe(tmp_path, rounds=3, algorithm=algorithm, clients=clients, evaluation={"per_client": True})
    summary = run(recipe, tmp_path / "run", silent)
    assert summary["eval_loss"][-1] < summary["eval_loss"][0] - 0.05
    assert list(summary["eval"]) == ["clients"]  # not the set that is held out here: no figure is of it
    with pytest.raises(UserError, match="fedsa-lora has no global model"):
        export_folder(tmp_path / "run", tmp_path / "model", silent)


def test_ferret_over_fedit_sends_a_projection_and_its_adapter_is_exported(tmp_path: Path) -> None:
    training = {"learning_rate": 0.3, "steps": 3, "clip": "none"}
    algorithm = {"name": "ferret", "over": {"name": "fedit", "rank": 4}, "coordinates": 512, "training": training}
    summary = run(tiny_recipe(tmp_path, rounds=3, algorithm=algorithm), tmp_path / "run", silent)
    assert summary["eval_loss"][-1] < summary["eval_loss"][0] - 0.05
    export_folder(tmp_path / "run", tmp_path / "adapter", silent, adapter_alone=True)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    export_folder(tmp_path / "run", tmp_path / "model", silent)
    export_delta(tmp_path / "run", tmp_path / "delta", silent)
    assert (
        apply_delta("tiny", tmp_path / "delta", tmp_path / "again", silent)
        == read_delta(tmp_path / "delta").fingerprint
    )
