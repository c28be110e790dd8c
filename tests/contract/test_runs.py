"""Whole runs: the same bits every time, wherever they are stopped, however they are carried out."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedferret.core.errors import RunError, UserError
from fedferret.core.log import Log
from fedferret.experiment import Experiment
from fedferret.runner import Interrupted, run
from fedferret.tracking import checkpoint
from fedferret.tracking.events import read
from site_folders import FERRET
from tiny_runs import silent, tiny_recipe, tiny_tables

pytestmark = pytest.mark.slow(seconds=20)

METHODS: dict[str, Mapping[str, Any]] = {"ferret": FERRET, "fedavg": {"name": "fedavg"}}


@pytest.fixture(scope="module", params=METHODS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Any]]:
    """A run that nothing disturbed: its method's settings and its folder."""
    folder = tmp_path_factory.mktemp(f"whole-{request.param}")
    run(tiny_recipe(folder, algorithm=METHODS[request.param]), folder / "run", silent)
    return folder, METHODS[request.param]


def figures(out: Path) -> dict[str, Any]:
    """The numbers that must be equal, from the folder's files alone."""
    summary = json.loads((out / "summary.json").read_text())
    names = ("eval_loss", "eval", "eval_rounds", "bytes_up_by_round", "bytes_down_by_round", "train_loss_by_round")
    return {name: summary[name] for name in names} | {
        "status": summary["status"],
        "fingerprints": [read(out).rounds[number].fingerprint for number in sorted(read(out).rounds)],
        "log": Log.read(out / "log", 3).since(0),
    }


def play(folder: Path, algorithm: Mapping[str, Any], out: str, **changes: Any) -> dict[str, Any]:
    """One more run of the same recipe beside the whole one."""
    run(tiny_recipe(folder, algorithm=algorithm, **changes), folder / out, silent)
    return figures(folder / out)


def test_the_same_run_twice_has_the_same_bits(whole: tuple[Path, Mapping[str, Any]]) -> None:
    folder, algorithm = whole
    again = play(folder, algorithm, "again")
    assert again == figures(folder / "run")
    assert len(again["eval_loss"]) == 4 and again["eval_loss"][-1] < again["eval_loss"][0]
    assert again["status"] == "finished"


def test_a_finished_run_is_left_alone(whole: tuple[Path, Mapping[str, Any]]) -> None:
    folder, algorithm = whole
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    said: list[str] = []
    run(tiny_recipe(folder, algorithm=algorithm), folder / "run", said.append)
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before
    assert "nothing to do" in said[0]


def test_summary_and_report_that_a_kill_after_the_last_event_left_unwritten_are_written(
    whole: tuple[Path, Mapping[str, Any]], tmp_path: Path
) -> None:
    folder, algorithm = whole
    out = shutil.copytree(folder / "run", tmp_path / "run")
    written = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_text(json.dumps({**written, "status": "in progress"}))
    (out / "report.html").unlink()
    assert run(tiny_recipe(folder, algorithm=algorithm), out, silent)["status"] == "finished"
    assert json.loads((out / "summary.json").read_text())["status"] == "finished" and (out / "report.html").exists()


@pytest.mark.parametrize(
    "execution", [{"engine": "debug"}, {"memory": "lean"}, {"tensorboard": True}], ids=lambda table: next(iter(table))
)
def test_settings_of_the_second_kind_change_no_bit(
    whole: tuple[Path, Mapping[str, Any]], execution: Mapping[str, Any]
) -> None:
    folder, algorithm = whole
    assert play(folder, algorithm, f"with-{next(iter(execution))}", execution=execution) == figures(folder / "run")


def interrupting(monkeypatch: pytest.MonkeyPatch, where: str, round: int) -> None:
    """Press Ctrl-C in that round: while its clients train, just before it is saved, or while it is evaluated."""
    home: Any = {"begin": checkpoint, "save": checkpoint, "score": Experiment}[where]
    plain: Callable[..., Any] = getattr(home, "save" if where == "begin" else where)

    def pressed(*args: Any, **kwargs: Any) -> Any:
        state = args[1]
        if state.round == round and where != "begin":
            raise KeyboardInterrupt
        result = plain(*args, **kwargs)
        if state.round == round:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(home, "save" if where == "begin" else where, pressed)


@pytest.mark.parametrize(
    ("where", "round"), [("save", 1), ("begin", 1), ("score", 1), ("score", 0), ("begin", 2), ("score", 3)]
)
def test_stopped_at_any_moment_and_resumed_is_uninterrupted(
    whole: tuple[Path, Mapping[str, Any]], where: str, round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, algorithm = whole
    out, recipe = folder / f"stopped-{where}-{round}", tiny_recipe(folder, algorithm=algorithm)
    with monkeypatch.context() as patch:
        interrupting(patch, where, round)
        with pytest.raises(Interrupted, match=r"stopped after round \d; the same command goes on from there"):
            run(recipe, out, silent)
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    run(recipe, out, silent)
    assert figures(out) == figures(folder / "run")


def test_what_a_crash_appended_to_the_log_is_played_again(
    whole: tuple[Path, Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, algorithm = whole
    out, recipe = folder / "crashed", tiny_recipe(folder, algorithm=algorithm)

    class Crash(BaseException):
        """The process is gone."""

    def crash(folder: Path, state: Any) -> None:
        if state.round == 2:
            raise Crash
        plain(folder, state)

    plain = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", crash)
        with pytest.raises(Crash):
            run(recipe, out, silent)
    assert checkpoint.saved_round(out) == 1 and list((out / "log").glob("000002.*"))
    run(recipe, out, silent)
    assert figures(out) == figures(folder / "run")


def test_another_recipe_is_refused_and_the_difference_named(whole: tuple[Path, Mapping[str, Any]]) -> None:
    folder, algorithm = whole
    with pytest.raises(UserError, match=r"holds a run with another seed \(1 there, 2 here\): choose another folder"):
        run(tiny_recipe(folder, algorithm=algorithm, seed=2), folder / "run", silent)
    with pytest.raises(UserError, match=r"another clients.per_round \(2 there, 3 here\)"):
        run(tiny_recipe(folder, algorithm=algorithm, clients={"per_round": 3}), folder / "run", silent)


def test_a_run_with_too_few_clients_ends_resumable(tmp_path: Path) -> None:
    hopeless = {"name": "fedavg", "training": {"learning_rate": 1e30, "clip": "none", "steps": 3}}
    recipe = tiny_recipe(tmp_path, algorithm=hopeless)
    for _ in range(2):
        with pytest.raises(RunError, match=r"round 1: 0 clients replied, 1 are needed \(.*the loss is .* at step"):
            run(recipe, tmp_path / "run", silent)
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 0
        assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow(seconds=45)
def test_a_process_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    """By Ctrl-C; ``test_processes.py`` kills."""
    tables = tiny_tables(tmp_path, algorithm=METHODS["ferret"], rounds=12)
    file, out = tmp_path / "recipe.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(tables))
    program = "from fedferret.cli import main; main()"
    command = [sys.executable, "-c", program, "run", str(file), "--out", str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children would ignore it
    )
    while rounds_begun(out) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert re.match(r"fedferret: stopped after round \d+; the same command goes on from there", errors.splitlines()[-1])
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "Resuming after round" in again.stdout
    run(tiny_recipe(tmp_path, algorithm=METHODS["ferret"], rounds=12), tmp_path / "whole", silent)
    stopped, unstopped = (json.loads((path / "summary.json").read_text()) for path in (out, tmp_path / "whole"))
    assert stopped["eval_loss"] == unstopped["eval_loss"] and len(stopped["eval_loss"]) == 13
    assert stopped["bytes_down_by_round"] == unstopped["bytes_down_by_round"]


def rounds_begun(out: Path) -> int:
    """How many rounds the log has."""
    return len(list((out / "log").glob("*.record")))


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, rounds=6)
    run(recipe, tmp_path / "whole", lambda line: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(client: str) -> None:
        if rounds_begun(tmp_path / "full"):  # from then on no file may be longer: soon the event log is
            resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))

    try:
        with pytest.raises(RunError, match=r"File too large \(.*\): every finished round is safe"):
            run(recipe, tmp_path / "full", lambda line: None, on_client=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(recipe, tmp_path / "full", lambda line: None)
    logs = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "log").iterdir()} for name in ("whole", "full")
    ]
    assert logs[0] == logs[1]
