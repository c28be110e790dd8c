"""Whole runs of SLoRA and SA-FedLoRA: from a recipe over the border of stages to an export and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedferret import recipe
from fedferret.config import from_tables
from fedferret.core.errors import UserError
from fedferret.estimate import estimate
from fedferret.export import apply_delta, export_delta, export_folder
from fedferret.runner import run
from fedferret.tracking.events import read
from tiny_runs import silent, tiny_tables
from unit.test_classification_runs import TRAINING, tables, write_texts

pytestmark = [pytest.mark.usefixtures("no_plots"), pytest.mark.slow(seconds=6)]


def exported_alike(out: Path, base: str, folder: Path) -> None:
    """A folder written from the run, and from the base and the run's delta."""
    one = export_folder(out, folder / "model", silent)
    export_delta(out, folder / "delta", silent)
    assert apply_delta(base, folder / "delta", folder / "again", silent) == one
    for path in (folder / "model").iterdir():
        assert path.read_bytes() == (folder / "again" / path.name).read_bytes()


def test_slora_takes_a_classifier_and_says_how_much_of_the_update_its_factors_keep(tmp_path: Path) -> None:
    """The mask's values travel, then the factors; the report has the energy, and clients that train alone."""
    slora = {"name": "slora", "sparse_rounds": 1, "density": 0.2, "rank": 4, "modules": "all-linear"}
    slora |= {"sparse_training": TRAINING, "training": TRAINING}
    write_texts(tmp_path)
    evaluation = {"every": 2, "local_only_clients": 1}
    settings = recipe(
        **tables(tmp_path, rounds=2, model={"name": "tiny-encoder"}, algorithm=slora, evaluation=evaluation)
    )
    assert from_tables(settings.tables()) == settings
    summary = run(settings, tmp_path / "run", silent)
    events = read(tmp_path / "run")
    assert set(events.evaluations) == {0, 2} and "local-only" in events.baselines
    ((number, who, note),) = events.notices
    assert (number, who) == (1, "server") and note.startswith("stage 2 of slora begins: fedit, energy kept 0.")
    assert note in (tmp_path / "run" / "report.html").read_text()
    cost = estimate(settings)
    assert [which for which, _, _ in cost.by_rounds] == ["round 1", "round 2"]
    for sent, number in zip(summary["bytes_up_by_round"], (0, 1), strict=True):
        up = 4 * cost.by_rounds[number][1]  # four clients
        assert up < sent < up + 4 * cost.framing
    exported_alike(tmp_path / "run", "tiny-encoder", tmp_path)


def test_sa_fedlora_goes_over_all_its_borders_and_its_adapter_has_no_checkpoint(tmp_path: Path) -> None:
    training = {"learning_rate": 0.05, "steps": 2}
    falling: dict[str, Any] = {"name": "sa-fedlora", "full_rounds": 1, "heating_rounds": 1, "annealing_rounds": 2}
    falling |= {"max_rank": 4, "min_rank": 1, "exponent": 1.0, "full_training": training}
    made = tiny_tables(tmp_path, algorithm=falling, rounds=4)
    made["algorithm"]["training"] = {"steps": 2, "learning_rate": 0.01}
    settings = from_tables(made)
    assert [which for which, _, _ in estimate(settings).by_rounds] == [f"round {number}" for number in range(1, 5)]
    summary = run(settings, tmp_path / "run", silent)
    assert summary["eval_loss"][-1] < summary["eval_loss"][0]
    up = summary["bytes_up_by_round"]
    assert up[0] > up[1] > up[2] > up[3]
    notes = [note for _, _, note in read(tmp_path / "run").notices]
    assert [note.partition(", energy")[0] for note in notes] == [
        "stage 2 of sa-fedlora begins: fedit",
        "stage 3 of sa-fedlora begins: fedit, rank 3",
        "stage 4 of sa-fedlora begins: fedit, rank 1",
    ]
    exported_alike(tmp_path / "run", "tiny", tmp_path)
    with pytest.raises(UserError, match="sa-fedlora changes the weights under its adapter too"):
        export_folder(tmp_path / "run", tmp_path / "adapter", silent, adapter_alone=True)
