"""Runs are a record when every rule holds, and each rule that fails is named with what was found."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedferret import recipe
from fedferret.cli import app
from fedferret.comparison.records import TRACKS, RecordRun, p_value, read_tracks
from fedferret.runner import run
from fedferret.tracking.events import FILE, Run
from tiny_runs import silent, tiny_recipe, write_rows

pytestmark = pytest.mark.slow(seconds=7)

RATE, RATES = 3.0, (1.0, 10.0)
TRACK = """
[toy]
title = "Toy"
rounds = 1
model.name = "tiny"
data = {{ source = "files", path = "{rows}", client_column = "who", held_out_fraction = 0.2 }}
text.max_tokens = 64
clients.per_round = 2
training = {{ batch_size = 4, steps = 1 }}

[longer]
title = "Longer"
like = "toy"
rounds = 2
"""


def record(*words: str | Path, code: int = 0) -> str:
    """Run the command and return its output."""
    result = CliRunner().invoke(app, ["record", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of FedAvg and of it in 8 bits, seeds 1 to 3, FedAvg at two more rates, and a file of tracks."""
    base = tmp_path_factory.mktemp("records")
    cases = [(name, RATE, seed) for name in ("fedavg", "fedavg-8bit") for seed in (1, 2, 3)]
    for name, rate, seed in cases + [("fedavg", rate, 1) for rate in RATES]:
        training = {"learning_rate": rate, "steps": 1, "batch_size": 4}
        algorithm = {"name": name, "weighting": "equal", "training": training}
        out = base / (name if rate == RATE else f"{name}-{rate:g}") / f"seed-{seed}"
        run(tiny_recipe(base, seed=seed, rounds=1, algorithm=algorithm), out, silent)
    (base / "tracks.toml").write_text(TRACK.format(rows=write_rows(base)))
    return base


@pytest.fixture
def words(folder: Path) -> list[str | Path]:
    """The options of a set of runs that keeps every rule."""
    rest = [word for rate in RATES for word in ("--control", folder / f"fedavg-{rate:g}")]
    return ["--control", folder / "fedavg", *rest, "--tracks", folder / "tracks.toml"]


def failing(output: str) -> list[str]:
    return [line.split()[1] for line in output.splitlines() if line.startswith("FAIL")]


def changed(source: Path, target: Path, old: str, new: str) -> Path:
    """A copy of a row's folder with one text of its recipes changed."""
    shutil.copytree(source, target)
    for path in target.glob("*/recipe.toml"):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return target


def edited(row: Path, target: Path, seed: int, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
    """A copy of a row's folder with the events of one seed changed, or left out."""
    shutil.copytree(row, target)
    path = target / f"seed-{seed}" / FILE
    events = [edit(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in events if event is not None))
    return target


def test_a_set_that_keeps_every_rule_gives_the_line(folder: Path, words: list[str | Path]) -> None:
    output = record(folder / "fedavg-8bit", *words, "--who", "Ann", "--commit", "abc", "--log", "LOG.md")
    assert not failing(output) and "Track: toy (Toy), 1 rounds" in output
    events = (folder / "fedavg-8bit" / "seed-1" / FILE).read_text().splitlines()
    entry = next(event for event in map(json.loads, events) if event["event"] == "round")
    up = sum(entry["bytes_up"].values()) / 2
    line = output.splitlines()[-1]
    assert line.startswith(f"| toy | {up:,.0f} | ") and line.endswith("| abc | LOG.md |")
    assert "| Ann | fedavg-8bit, weighting = equal, rate 3 |" in line and output.count("seed 2: ") == 1


def test_what_is_missing_is_named(folder: Path, words: list[str | Path]) -> None:
    output = record(folder / "fedavg-8bit" / "seed-2", "--control", folder / "fedavg", *words[-2:], code=1)
    assert failing(output) == ["seeds:", "best", "target:"]
    assert "seed 1 of contender is missing; seed 3 of contender is missing" in output
    assert "no run of FedAvg at a lower rate than 3; no run of FedAvg at a higher rate than 3" in output


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ('weighting = "equal"', 'weighting = "examples"', "weighting:"),
        ("per_round = 2", "per_round = 3", "track:"),
        ("steps = 1", "steps = 2", "track:"),
        ("seed = 3", "seed = 4", "seeds:"),
        ("rounds = 1", "rounds = 2", "track:"),
    ],
)
def test_every_change_of_the_contender_fails(
    old: str, new: str, rule: str, folder: Path, words: list[str | Path], tmp_path: Path
) -> None:
    row = folder / "fedavg-8bit"
    if old == "seed = 3":
        shutil.copytree(row, tmp_path / "row")
        path = tmp_path / "row" / "seed-3" / "recipe.toml"
        path.write_text(path.read_text().replace(old, new))
    else:
        changed(row, tmp_path / "row", old, new)
    assert rule in failing(record(tmp_path / "row", *words, code=1))


@pytest.mark.parametrize(
    ("event", "field", "value", "rule"),
    [
        ("start", "data_fingerprint", "0", "same"),
        ("start", "base", "0", "same"),
        ("round", "bytes_up", {}, "ledger:"),
        ("evaluation", "who", "clients", "one"),
        ("end", "event", "interrupted", "whole"),
    ],
)
def test_every_change_of_the_events_fails(
    event: str, field: str, value: object, rule: str, folder: Path, words: list[str | Path], tmp_path: Path
) -> None:
    def change(each: dict[str, Any]) -> dict[str, Any]:
        return {**each, field: value} if each["event"] == event else each

    row = edited(folder / "fedavg-8bit", tmp_path / "row", 1, change)
    assert rule in failing(record(row, *words, code=1))


def test_a_contender_below_the_target_and_a_control_below_its_best_rate_fail(
    folder: Path, words: list[str | Path]
) -> None:
    controls = ["--control", folder / "fedavg", "--control", folder / "fedavg-10", *words[-2:]]
    assert failing(record(folder / "fedavg-1", *controls, code=1))[-1] == "target:"
    slow = ["--control", folder / "fedavg-1", "--control", folder / "fedavg" / "seed-1"]
    output = record(folder / "fedavg-8bit", *slow, "--tracks", folder / "tracks.toml", code=1)
    assert "no run of FedAvg at a higher rate" in output


def test_a_run_stopped_before_its_first_later_evaluation_proves_no_rate(folder: Path, tmp_path: Path) -> None:
    def stopped(event: dict[str, Any]) -> dict[str, Any] | None:
        return None if event["event"] == "end" or (event["event"] == "evaluation" and event["round"]) else event

    high = edited(folder / "fedavg-10", tmp_path / "high", 1, stopped)
    controls = [word for row in (folder / "fedavg", folder / "fedavg-1", high) for word in ("--control", row)]
    output = record(folder / "fedavg-8bit", *controls, "--tracks", folder / "tracks.toml", code=1)
    assert "best" in failing(output)


def test_a_seed_without_a_last_loss_is_no_record(folder: Path, words: list[str | Path], tmp_path: Path) -> None:
    def lost(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "evaluation" and event["round"]:
            for figures in event["results"].values():
                figures["loss"] = math.nan
        return event

    output = record(edited(folder / "fedavg-8bit", tmp_path / "row", 2, lost), *words, code=1)
    assert failing(output) == ["whole", "target:"] and "no loss after the last round" in output


def test_the_line_is_one_row_whatever_the_name(folder: Path, words: list[str | Path]) -> None:
    output = record(folder / "fedavg-8bit", *words, "--who", "Ann\nBob|C")
    assert r"| Ann Bob\|C | fedavg-8bit" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{folder}/fedavg"], "no run of FedAvg was given"),
        (["{folder}/fedavg-8bit", "--control", "{folder}/nowhere"], "not a run folder"),
        (["{folder}/fedavg", "--control", "{folder}/fedavg"], "given on both sides"),
        (
            ["{folder}/fedavg-8bit", "--control", "{folder}/fedavg", "--tracks", "{folder}/none"],
            "no such file of tracks",
        ),
    ],
)
def test_bad_usage_is_one_line(given: list[str], message: str, folder: Path) -> None:
    output = record(*(word.format(folder=folder) for word in given), code=2)
    assert message in output and len(output.splitlines()) == 1


def test_the_packages_tracks_are_the_five_of_the_page() -> None:
    tracks = read_tracks(TRACKS)
    assert list(tracks) == ["smollm2-sgd", "smollm2-adamw", "gemma3-270m", "fixed-cohort", "small-150"]
    assert tracks["smollm2-adamw"][1]["training"]["optimizer"] == "adamw"
    assert tracks["fixed-cohort"][1]["data"]["partition"]["clients"] == 4
    page = (Path(__file__).parents[2] / "docs" / "records.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in tracks)


def test_p_is_that_of_students_distribution() -> None:
    assert p_value([0.97, 0.98, 0.99]) == pytest.approx(0.1127, abs=1e-4)  # t = √3 with two degrees of freedom
    assert p_value([0.95, 0.97, 0.99]) == pytest.approx(0.5) and math.isnan(p_value([1.0, 1.0, 1.0]))


def test_a_models_folder_is_the_same_however_a_run_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that had its absolute path was no record on the track; one with the track's path is, from any folder."""
    root = Path(__file__).parents[2]
    _, track = read_tracks(TRACKS)["small-150"]

    def named(name: str) -> str:
        made = recipe(rounds=1, model={"name": name}, data={"source": "chitchat"}, algorithm={"name": "fedavg"})
        return str(RecordRun(root, made, Run()).facts()["model"]["name"])

    monkeypatch.chdir(root)
    assert named(str(root / "recipes/small/chat-3m")) == named("recipes/small/chat-3m") == track["model"]["name"]
    monkeypatch.chdir("/")
    assert named("recipes/small/chat-3m") == track["model"]["name"]
