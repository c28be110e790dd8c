"""`fedferret rewind`: what it says, writes down and refuses, and that whatever stops it a run goes on from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from fedferret.cli import app
from fedferret.config import Recipe
from fedferret.core.errors import RunError, UserError
from fedferret.core.log import Log
from fedferret.rewind import rewind
from fedferret.runner import run
from fedferret.sites.members import Members
from fedferret.tracking import checkpoint, events
from site_folders import sites_recipe, write_sites
from tiny_runs import silent
from unit.test_checkpoint import PowerCut, power_cut
from unit.test_damaged_files import RECORD, STATE, cut, flip, lose, swap
from unit.test_damaged_files import without as without_lines
from unit.written_run import downgrade

ROUNDS, PAST = 4, "state/history/000002.state"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A finished run over three sites with private states, which keeps three rounds."""
    root = tmp_path_factory.mktemp("whole")
    recipe = sites_recipe(root, write_sites(root), rounds=ROUNDS, execution={"history": 2})
    run(recipe, root / "run", silent)
    return recipe, root / "run"


@pytest.fixture
def copy(whole: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    """That run in a folder of the test's."""
    return whole[0], Path(shutil.copytree(whole[1], tmp_path / "run"))


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())  # type: ignore[no-any-return]


def figures(out: Path) -> Any:
    """All that must be equal to an undisturbed run's."""
    names = ("eval_loss", "bytes_up_by_round", "bytes_down_by_round", "train_loss_by_round", "status", "rounds")
    fingerprints = [events.read(out).rounds[number].fingerprint for number in range(1, ROUNDS + 1)]
    return {name: summary(out)[name] for name in names}, fingerprints, Log.read(out / "log", ROUNDS).since(0)


def test_a_finished_run_is_rewound_and_run_again_and_what_was_sent_stays_counted(
    whole: tuple[Recipe, Path], copy: tuple[Recipe, Path]
) -> None:
    recipe, out = copy
    sent = sum(sum(summary(out)[f"bytes_{way}_by_round"][2:]) for way in ("up", "down"))
    result = CliRunner().invoke(app, ["rewind", str(out), "--to", "2"])
    assert result.exit_code == 0, result.output
    (epoch,) = [each.epoch for each in events.read(out).rewinds]
    assert result.stdout.startswith(f"{out} is at round 2, epoch {epoch}. Discarded: rounds 3 to 4 (")
    assert epoch > 1_700_000_000, "a time: higher than that of any copy that was rewound before"
    assert "`fedferret run` or `serve`" in result.stdout
    assert (summary(out)["status"], summary(out)["rounds"], summary(out)["bytes_discarded"]) == ("rewound", 2, sent)
    run(recipe, out, silent)
    assert figures(out) == figures(whole[1])
    assert (summary(out)["bytes_discarded"], summary(out)["rewinds"]) == (sent, 1)
    page = (out / "report.html").read_text()
    assert "discarded by rewinding" in page and "<td>3 to 4</td>" in page


def test_whatever_stops_the_command_the_run_goes_on_and_the_event_log_knows(
    copy: tuple[Recipe, Path], whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = copy
    with power_cut(monkeypatch, 10_000) as changes:
        rewind(Path(shutil.copytree(out, tmp_path / "counted")), 3, log=silent)
    for moment in range(len(changes)):
        folder = Path(shutil.copytree(out, tmp_path / str(moment)))
        with power_cut(monkeypatch, moment), pytest.raises(PowerCut):
            rewind(folder, 3, log=silent)
        now = checkpoint.progress(folder)
        assert now is not None and (now.round, now.epoch > 0) == ((3, True) if moment else (4, False))
        if moment in (0, 1, len(changes) - 1):
            run(recipe, folder, silent)
            assert figures(folder) == figures(whole[1])
        else:
            rewind(folder, 3, log=silent)
        first = events.read(folder).rewinds[:1]
        assert [(each.round, each.epoch, each.discarded) for each in first] == (
            [(3, now.epoch, (4,))] if moment else []
        )


def test_the_present_round_discards_nothing_and_begins_an_epoch(
    whole: tuple[Recipe, Path], copy: tuple[Recipe, Path]
) -> None:
    recipe, out = copy
    said: list[str] = []
    found = rewind(out, ROUNDS, log=said.append)
    assert (found.round, found.discarded, found.bytes) == (ROUNDS, (), 0) and "Discarded: no round." in said[0]
    run(recipe, out, silent)
    assert figures(out) == figures(whole[1])


def test_a_retired_site_is_asked_no_more(copy: tuple[Recipe, Path]) -> None:
    recipe, out = copy
    said: list[str] = []
    rewind(out, 3, "bo", said.append)
    assert "bo is retired: no round from 4 on samples it." in said[0]
    assert Members(out, recipe).names() == ["ann", "cleo"]
    run(recipe, out, silent)  # the recipe is the same: a retired site is a fact of the run
    assert events.read(out).rounds[4].clients == ("ann", "cleo")
    assert events.read(out).rounds[3].clients == ("ann", "bo", "cleo")
    rewind(out, 2, log=silent)
    run(recipe, out, silent)
    assert events.read(out).rounds[3].clients == ("ann", "cleo")  # from then on, also where rounds are run again
    assert [each.retired for each in events.read(out).rewinds] == [("bo",), ()]
    with pytest.raises(UserError, match=r"--without bo: is retired already; allowed: ann, cleo"):
        rewind(out, 3, "bo", silent)


def test_a_simulated_client_without_its_state_begins_anew_and_that_is_said(copy: tuple[Recipe, Path]) -> None:
    recipe, out = copy
    lost = sorted((out / "state" / "clients").glob("*.000002.state"))
    lost[0].unlink()
    said: list[str] = []
    found = rewind(out, 2, log=said.append)
    (name,) = found.begun_anew
    assert f"Begins anew, as its private state is no longer held: {name}." in said[0]
    run(recipe, out, silent)
    assert summary(out)["status"] == "finished" and not events.read(out).failures
    assert f"<td>{name}</td>" in (out / "report.html").read_text()


def _unfinished(out: Path) -> None:
    (out / "state" / "run.state").unlink()
    shutil.rmtree(out / "log")


def _foreign(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()
    (out / "letter.txt").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "to", "without", "reason"),
    [
        (silent, 1, None, r"round 1 is no longer kept: this run keeps rounds 2 to 4 \(execution.history = 2\)"),
        (silent, 9, None, "round 9 is not reached yet: this run is at round 4"),
        (silent, 2, "dov", "--without dov: is no site of this run; allowed: ann, bo, cleo"),
        (_unfinished, 2, None, "no round is finished yet, so there is nothing to rewind"),
        (_foreign, 2, None, "not a run folder, it has no recipe.toml"),
        (downgrade, 2, None, "was written by fedferret 0.1"),
        (cut(STATE), 2, None, r"run\.state is damaged"),
        (lose(PAST), 2, None, r"round 2 cannot be rebuilt, choose another one: \S*000002\.state is missing"),
        (cut(PAST), 2, None, r"round 2 cannot be rebuilt, choose another one: \S*000002\.state is damaged"),
        (swap(PAST, RECORD), 2, None, r"000002\.state holds a Record and no checkpoint"),
        (flip(RECORD), 2, None, r"000001\.record is damaged, or of another run"),
        (swap(RECORD, "log/000002.record"), 2, None, r"000001\.record is damaged, or of another run"),
        (lose(RECORD), 2, None, r"000001\.record is missing"),
        (lose(STATE), 2, None, r"run\.state is missing, and \S*log holds later rounds"),
        (lose("events.jsonl"), 2, None, r"events\.jsonl is missing, and the run in \S* has begun"),
        (without_lines("events.jsonl", '"round": 1,'), 2, None, "it has no round 1"),
        (cut("recipe.toml"), 2, None, r"recipe\.toml cannot be used"),
        (cut("summary.json"), 2, None, r"summary\.json is damaged"),
    ],
)
def test_what_cannot_be_rewound_is_refused_in_one_line_and_nothing_changes(
    prepare: Any, to: int, without: str | None, reason: str, copy: tuple[Recipe, Path]
) -> None:
    _, out = copy
    prepare(out)
    before = contents(out)
    words = ["rewind", str(out), "--to", str(to), *(["--without", without] if without else [])]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (1, 2) and result.stderr.count("\n") == 1, result.output
    with pytest.raises((UserError, RunError), match=reason):
        rewind(out, to, without, silent)
    assert contents(out) == before


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_site_that_the_run_cannot_do_without_is_not_retired(copy: tuple[Recipe, Path]) -> None:
    _, out = copy
    text = (out / "recipe.toml").read_text()
    (out / "recipe.toml").write_text(text.replace("min_clients = 1", "min_clients = 3"))
    with pytest.raises(UserError, match=r"--without bo: that leaves 2 sites, and clients.min_clients=3 are needed"):
        rewind(out, 3, "bo", silent)


@pytest.mark.parametrize(
    ("lock", "reason"), [("state", "in use by another process"), ("server", "a server is running there")]
)
def test_a_folder_that_a_run_or_a_server_holds_is_left_alone(lock: str, reason: str, copy: tuple[Recipe, Path]) -> None:
    _, out = copy
    (out / lock).mkdir(exist_ok=True)
    with FileLock(out / lock / ".lock"), pytest.raises(UserError, match=reason):
        rewind(out, 3, log=silent)
    rewind(out, 3, log=silent)


def test_events_that_end_before_the_checkpoint_are_refused(copy: tuple[Recipe, Path]) -> None:
    _, out = copy
    (out / events.FILE).write_text("")
    with pytest.raises(RunError, match=rf"ends with round 0, and .*run\.state is of round {ROUNDS}"):
        rewind(out, 2, None, silent)
    assert checkpoint.saved_round(out) == ROUNDS and len(list((out / "log").glob("*.record"))) == ROUNDS
