"""The command line: output, files and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fedferret.cli import app
from tiny_runs import tiny_recipe
from unit.written_run import downgrade

COMMAND = [sys.executable, "-c", "from fedferret.cli import main; main()"]


def fedferret(*words: str | Path, code: int = 0) -> str:
    """Run a command and return its standard output."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file of two rounds."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.toml").write_text(tiny_recipe(folder, rounds=2).to_toml())
    return folder / "recipe.toml"


def test_run_report_export_apply(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    output = fedferret("run", recipe, "--out", out, "--set", "algorithm.coordinates=512")
    assert f"Report:       {out / 'report.html'}" in output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished" and len(summary["eval_loss"]) == 3
    assert "coordinates = 512" in (out / "recipe.toml").read_text()
    (out / "report.html").unlink()
    assert str(out / "report.html") in fedferret("report", out)
    assert (out / "report.html").exists()
    output = fedferret("export", out, "--to", tmp_path / "model", "--delta", tmp_path / "tuned.delta")
    assert "SHA-256" in output and "bytes)" in output
    fedferret("apply", "tiny", tmp_path / "tuned.delta", "--to", tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("model", "again"))
    assert first.read_bytes() == second.read_bytes()
    make_old(out, tmp_path / "tuned.delta")
    for words in (
        ("run", recipe, "--out", out),
        ("report", out),
        ("export", out, "--to", tmp_path / "none"),
        ("export", out, "--delta", tmp_path / "none"),
        ("apply", "tiny", tmp_path / "tuned.delta", "--to", tmp_path / "none"),
    ):
        refused = CliRunner().invoke(app, [str(word) for word in words])
        (line,) = refused.stderr.splitlines()
        assert refused.exit_code == 2 and "was written by fedferret 0.1" in line and "reads it" in line
    assert not (tmp_path / "none").exists()


def make_old(run: Path, delta: Path) -> None:
    """Make the run's folder and the delta those of fedferret 0.1, in recipe, events and wire version."""
    downgrade(run)
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('name = "ferret"\n', 'name = "ferret"\nbudget = "total"\n'))
    for path in (delta, *(run / "log").iterdir(), run / "state" / "run.state"):
        encoded = path.read_bytes()
        path.write_bytes(encoded[:2] + b"\x01" + encoded[3:])


def test_list_names_every_method_model_and_source() -> None:
    output = fedferret("list")
    for name in ("ferret", "fedavg", "fedprox", "packaged:smollm2", "tiny", "chitchat", "files", "reasoning-gym"):
        assert name in output


def test_show_gives_the_resolved_recipe_and_its_cost(recipe: Path) -> None:
    output = fedferret("show", recipe)
    assert "coordinates = 1024" in output and "up, per client and round" in output


def test_the_size_of_client_states_is_shown_before_they_fill_the_disk(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [recipe, "--set", 'algorithm={name="fedavg-top-k"}', "--set", "rounds=1"]
    assert "# disk, per client            362 KB, for 2 clients 725 KB at most" in fedferret("show", *words)
    assert "disk, per client" not in fedferret("show", recipe)
    stated = "fedavg-top-k keeps 362 KB of every client that took part, up to 725 KB in all on disk"
    begins, _, rounds = fedferret("run", *words, "--out", tmp_path / "roomy").partition("round 1/1")
    assert f"{stated}\n" in begins and rounds, "with room, and before the first of it is written"
    monkeypatch.setattr("fedferret.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=700_000))
    assert f"{stated}, and {tmp_path / 'small'} has room for 700 KB" in fedferret(
        "run", *words, "--out", tmp_path / "small"
    )


def test_help_explains_every_command() -> None:
    assert all(name in fedferret("--help") for name in ("run", "list", "show", "report", "export", "apply", "rewind"))
    for name in ("run", "show", "report", "export", "apply", "rewind"):
        assert "--help" in fedferret(name, "--help")


def run_process(words: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "nowhere.toml"],
            "fedferret: nowhere.toml: there is no such recipe; see `recipes/` or `fedferret list`",
        ),
        (["export", "nowhere", "--delta", "x"], "fedferret: nowhere: not a run folder, it has no recipe.toml"),
    ],
)
def test_invalid_input_is_an_error_of_one_line_and_exit_code_2_in_a_real_process(
    words: list[str], message: str
) -> None:
    result = run_process(words)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(message)


@pytest.mark.slow
def test_a_new_process_exports_the_run_of_another(recipe: Path, tmp_path: Path) -> None:
    feedback = ["--set", "algorithm.group_size=1", "--set", "algorithm.error_feedback=true"]
    feedback += ["--set", "algorithm.scale=shrunk"]
    fedferret("run", recipe, "--out", tmp_path / "run", *feedback)
    result = run_process(["export", tmp_path / "run", "--delta", tmp_path / "tuned.delta"])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tuned.delta").exists()
