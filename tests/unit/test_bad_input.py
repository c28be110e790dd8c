"""Every mistake a user can make is one line on standard error and exit code 2, before any weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from fedferret import models
from fedferret.cli import app
from tiny_runs import tiny_recipe, tiny_tables, write_rows


def refused(*words: str | Path, code: int = 2) -> str:
    """The one line that the command gives up with."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("fedferret: "), result.stderr
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights before refusing is itself a failure."""
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("weights were read"))


def write(folder: Path, **changes: Mapping[str, Any] | int) -> Path:
    """A recipe file with these changes."""
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(tiny_tables(folder, **changes)))
    return path


def bert(folder: Path) -> str:
    """The folder of a model that looks both ways."""
    (folder / "bert").mkdir()
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1}
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    return str(folder / "bert")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": {"name": "ferret", "coordinates": 100_000}},
            r"coordinates=100,000: this model has .* 90,624 weights",
        ),
        ({"algorithm": {"name": "ferret", "preset": "one-bit", "coordinates": 3}}, r"coordinates=3: .* choose 1\d to"),
        (
            {"algorithm": {"name": "ferret", "group_size": 2048}},
            r"coordinates=664, group_size=2048: this model has 90,624 weights, .* set coordinates to 45 or less",
        ),
        ({"algorithm": {"name": "ferret", "bits": 8}}, r"group_size=128, bits=8: .* set group_size=1, or bits=1"),
        (
            {"algorithm": {"name": "ferret", "error_feedback": True}},
            r"error_feedback=true, group_size=128: .* set group_size",
        ),
        (
            {"algorithm": {"name": "ferret", "preset": "one-bit", "error_feedback": True}},
            r'error_feedback=true, scale="unbiased": .* set scale="shrunk"',
        ),
        (
            {"algorithm": {"name": "ferret", "preset": "paper-code", "coordinates": 1}},
            r"largest block has .* choose 2 to",
        ),
        ({"algorithm": {"name": "ferret", "cordinates": 64}}, r'did you mean "coordinates"\?'),
        ({"algorithm": {"name": "fedavgg"}}, r'no method is called "fedavgg": did you mean "fedavg"\?'),
        ({"model": {"name": "no such model!"}}, r'model "no such model!": there is no such folder'),
        ({"model": {"name": "packaged:smollm3"}}, r"smollm2"),
        ({"data": {"source": "fils"}}, r'no data source is called "fils": did you mean "files"\?'),
        ({"data": {"response_column": "responce"}}, r'has no column "responce" \(data.response_column\): .*"response"'),
        ({"data": {"client_column": "whom"}}, r'has no column "whom" \(data.client_column\): did you mean "who"\?'),
        ({"data": {"path": "nowhere.jsonl"}}, r'there is no file "nowhere.jsonl": check data.path'),
        ({"clients": {"per_round": 5}}, r"clients.per_round=5: the data has 4 clients, set per_round to at most that"),
        ({"data": {"held_out_fraction": 0.0}}, r"data.held_out_fraction=0: nothing is held out to evaluate on"),
        ({"data": {"held_out_fraction": 0.01}}, r"no held-out example is left to evaluate on: hold out a larger share"),
        ({"text": {"template": "nowhere.txt"}}, r"nowhere\.txt"),
        (
            {"model": {"name": "packaged:gemma3-270m"}},
            r'text.template="chat": this model has no chat template: set template = "alpaca"',
        ),
        ({"execution": {"device": "abacus"}}, r"abacus"),
    ],
)
def test_a_recipe_that_cannot_be(changes: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, **changes)
    assert re.search(message, refused("run", path, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()  # a recipe that was refused claims no folder


def test_a_model_that_is_not_causal(tmp_path: Path) -> None:
    path = write(tmp_path, model={"name": bert(tmp_path)})
    assert "architecture BertForMaskedLM is not a causal language model" in refused(
        "run", path, "--out", tmp_path / "r"
    )
    assert "is not a causal language model" in refused("show", path)


def test_a_client_that_holds_nothing(tmp_path: Path) -> None:
    partition = {"kind": "dirichlet", "clients": 12, "alpha": 0.01, "min_examples": 0}
    tables = tiny_tables(tmp_path, data={"category_column": "who", "partition": partition})
    del tables["data"]["client_column"]
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(tables))
    assert re.search(
        r"client 'client-\d+' holds no example: give it data or leave it out",
        refused("run", path, "--out", tmp_path / "r"),
    )


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    assert "there is no such recipe" in refused("run", tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 3")
    assert "not TOML: Invalid value (at line 1" in refused("run", broken)
    broken.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused("run", broken)
    assert "cannot be read" in refused("show", tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b", "who": "x"}\n{"instruc')
    assert "line 2" in refused("run", write(tmp_path), "--out", tmp_path / "run")


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "letter.txt").write_text("mine")
    assert "exists and is no run folder: choose another one with --out" in refused(
        "run", path, "--out", tmp_path / "diary"
    )
    assert "exists and is no run folder" in refused("run", path, "--out", tmp_path / "diary" / "letter.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(tiny_recipe(tmp_path, seed=9).to_toml())
    line = refused("run", path, "--out", tmp_path / "run")
    assert "holds a run with another seed (9 there, 1 here): choose another folder with --out" in line
    older = tiny_recipe(tmp_path).to_toml().replace('cut = "response"\n', "")  # by a fedferret without the setting
    (tmp_path / "run" / "recipe.toml").write_text(older)
    assert "another text.cut ('prompt' there, 'response' here)" in refused("run", path, "--out", tmp_path / "run")


def test_a_folder_whose_recipe_is_broken(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("seed = = 3")
    assert "not TOML" in refused("run", path, "--out", tmp_path / "run")
    assert "not TOML" in refused("export", tmp_path / "run", "--to", tmp_path / "model")


def test_malformed_overrides(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert "must look like section.key=value" in refused("run", path, "--set", "coordinates")
    assert "there is no such setting" in refused("run", path, "--set", "algorithm.coordinatez=3")


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    assert "not a run folder" in refused("export", tmp_path, "--to", tmp_path / "model")
    assert "nothing to write: give --to FOLDER, --delta FILE, --adapter FOLDER or several" in refused(
        "export", tmp_path
    )
    refused("report", tmp_path)


def test_deltas_that_are_none(tmp_path: Path) -> None:
    rows = write_rows(tmp_path)
    assert "not a delta file" in refused("apply", "tiny", rows, "--to", tmp_path / "model")
    assert "there is no such file" in refused("apply", "tiny", tmp_path / "x.delta", "--to", tmp_path / "model")
    assert not (tmp_path / "model").exists()
