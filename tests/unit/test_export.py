"""Handing over: a folder that plain transformers loads, a file of kilobytes that rebuilds it, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedferret import models
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.experiment import Experiment
from fedferret.export import apply_delta, export_delta, export_folder, read_delta
from fedferret.runner import run
from fedferret.tracking.events import read
from fedferret.wire import codec
from tiny_runs import silent, tiny_recipe


@pytest.fixture(scope="module", params=["ferret", "fedavg"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder, and the fingerprint of its public weights."""
    folder = tmp_path_factory.mktemp(request.param)
    algorithm = {"name": "ferret", "coordinates": 512} if request.param == "ferret" else {"name": "fedavg"}
    recipe = tiny_recipe(folder, rounds=2, algorithm=algorithm)
    run(recipe, folder / "run", silent)
    public: Any = Experiment.load(recipe, folder / "run", silent).initial_state().public
    return folder, tree.fingerprint(public.weights)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What plain transformers finds there."""
    from transformers import AutoModelForCausalLM

    return tree.parameters(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))


def test_the_folder_holds_the_runs_weights_to_the_bit(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, fingerprint = finished
    assert export_folder(folder / "run", tmp_path / "model", silent) == fingerprint
    assert tree.fingerprint(loaded(tmp_path / "model")) == fingerprint


def test_the_delta_rebuilds_the_weights_to_the_bit(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, fingerprint = finished
    delta = export_delta(folder / "run", tmp_path / "tuned.delta", silent)
    assert delta.fingerprint == fingerprint
    assert apply_delta("tiny", tmp_path / "tuned.delta", tmp_path / "model", silent) == fingerprint
    assert tree.fingerprint(loaded(tmp_path / "model")) == fingerprint
    if delta.method == "ferret":
        assert (tmp_path / "tuned.delta").stat().st_size < 4000


def test_a_folder_of_the_base_serves_as_the_base(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, fingerprint = finished
    export_delta(folder / "run", tmp_path / "tuned.delta", silent)
    models.save_folder(models.load("tiny"), tmp_path / "base")
    assert apply_delta(str(tmp_path / "base"), tmp_path / "tuned.delta", tmp_path / "model", silent) == fingerprint


def test_another_base_is_refused_by_name(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    export_delta(folder / "run", tmp_path / "tuned.delta", silent)
    other = models.load("tiny")
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-3
    models.save_folder(other, tmp_path / "other")
    with pytest.raises(UserError, match=r"belongs to the base tiny \(SHA-256 .*\); .*other is another"):
        apply_delta(str(tmp_path / "other"), tmp_path / "tuned.delta", tmp_path / "model", silent)
    assert not (tmp_path / "model").exists()


def test_a_damaged_delta_is_refused_wherever_the_damage_is(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    path = tmp_path / "tuned.delta"
    export_delta(folder / "run", path, silent)
    whole = path.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 40))
    for place in [*places, len(whole) - 1]:
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]):
            path.write_bytes(data)
            with pytest.raises(UserError, match="not a delta file") as raised:
                read_delta(path)
            assert "\n" not in str(raised.value)
    path.write_bytes(codec.encode("something else"))
    with pytest.raises(UserError, match="not a delta file: it holds a str"):
        read_delta(path)
    with pytest.raises(UserError, match="there is no such file"):
        read_delta(tmp_path / "nowhere.delta")


def test_exporting_changes_nothing_and_overwrites_nothing(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    export_delta(folder / "run", tmp_path / "tuned.delta", silent)
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="exists: nothing is overwritten"):
        export_delta(folder / "run", tmp_path / "tuned.delta", silent)
    with pytest.raises(UserError, match="is not empty: nothing is overwritten"):
        export_folder(folder / "run", tmp_path, silent)


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder, it has no recipe\.toml"):
        export_delta(tmp_path, tmp_path / "tuned.delta", silent)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(tiny_recipe(tmp_path).to_toml())
    with pytest.raises(UserError, match="no round is finished yet"):
        export_folder(tmp_path / "run", tmp_path / "model", silent)


def test_a_client_that_keeps_no_model_has_none_to_export(tmp_path: Path) -> None:
    """Its residual is none: the folder would hold the global model under the client's name."""
    recipe = tiny_recipe(tmp_path, rounds=1, algorithm={"name": "fedavg-top-k"})
    run(recipe, tmp_path / "run", silent)
    client = next(iter(read(tmp_path / "run").rounds[1].clients))
    with pytest.raises(UserError, match="--client: what fedavg-top-k keeps at this client is no model"):
        export_folder(tmp_path / "run", tmp_path / "model", silent, client=client)
    assert not (tmp_path / "model").exists()
