"""Whatever happened to a file of a run or a site, a command says so in one line that names the file and the remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from fedferret.cli import app
from fedferret.config import load
from fedferret.runner import Interrupted, run
from fedferret.tracking import checkpoint
from fedferret.tracking.events import read
from fedferret.wire import codec
from site_folders import FERRET
from tiny_runs import silent, tiny_recipe, tiny_tables
from unit.written_grid import write_cell, written_grid
from unit.written_run import write_run

pytestmark = pytest.mark.slow(seconds=14)

Damage = Callable[[Path], object]
RESTORE = "restore the folder of the run from a copy"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that were stopped after round 2 of 3, of one recipe with two seeds, and the first one undisturbed."""
    root = tmp_path_factory.mktemp("damaged")
    save = checkpoint.save

    def stop(folder: Path, state: checkpoint.RunState) -> None:
        if state.round == 3 and folder.name != "whole":
            raise KeyboardInterrupt
        save(folder, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        for name, seed in (("stopped", 1), ("other", 2), ("whole", 1)):
            recipe = tiny_recipe(root, algorithm=FERRET, seed=seed)
            (root / f"{name}.toml").write_text(recipe.to_toml())
            with suppress(Interrupted):
                run(recipe, root / name, silent)
    return root


def outcome(*words: object) -> tuple[int, str]:
    """Exit code and standard error of a command, which shows no traceback."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stderr


def cut(name: str) -> Damage:
    """Lose the end of the file."""
    return lambda folder: one(folder, name).write_bytes(one(folder, name).read_bytes()[:-7])


def flip(name: str, place: int = 30) -> Damage:
    """Turn one bit."""

    def damage(folder: Path) -> None:
        content = bytearray(one(folder, name).read_bytes())
        content[place] ^= 4
        one(folder, name).write_bytes(content)

    return damage


def lose(name: str) -> Damage:
    """Remove the file."""
    return lambda folder: one(folder, name).unlink()


def occupy(name: str) -> Damage:
    """Put a folder in the file's place."""

    def damage(folder: Path) -> None:
        path = one(folder, name)
        path.unlink()
        path.mkdir()

    return damage


def lock(name: str) -> Damage:
    """Make the file unreadable, for root too: a link to itself."""

    def damage(folder: Path) -> None:
        path = one(folder, name)
        path.unlink()
        path.symlink_to(path.name)

    return damage


def pipe(name: str) -> Damage:
    """Put a pipe in the file's place, which nobody writes to."""

    def damage(folder: Path) -> None:
        one(folder, name).unlink()
        os.mkfifo(one(folder, name))

    return damage


def swap(name: str, source: str | None = None) -> Damage:
    """Put the file of the other run there, or another file of this run."""

    def damage(folder: Path) -> None:
        path = one(folder, name)
        other = folder.parent / "other" / path.relative_to(folder) if source is None else folder / source
        path.write_bytes((max(path.parent.iterdir()) if source == "last" else other).read_bytes())

    return damage


def without(name: str, words: str) -> Damage:
    """Remove the lines that have these words."""

    def damage(folder: Path) -> None:
        lines = one(folder, name).read_text().splitlines(keepends=True)
        one(folder, name).write_text("".join(line for line in lines if words not in line))

    return damage


def replace_text(name: str, old: str, new: str) -> Damage:
    """Change the text."""
    return lambda folder: one(folder, name).write_text(one(folder, name).read_text().replace(old, new))


def one(folder: Path, name: str) -> Path:
    """The first file of that name or pattern."""
    return min(folder.glob(name)) if "*" in name else folder / name


STATE, RECORD, CLIENT, EVENTS = "state/run.state", "log/000001.record", "state/clients/*.state", "events.jsonl"


@pytest.mark.parametrize(
    ("command", "damage", "file", "words"),
    [
        ("run", cut(STATE), STATE, "is damaged"),
        ("run", flip(STATE), STATE, "checksum differs"),
        ("run", lose(STATE), STATE, "is missing"),
        ("run", occupy(STATE), STATE, "Is a directory"),
        ("run", lock(STATE), STATE, "cannot be read"),
        ("run", pipe(STATE), STATE, "is no file"),
        ("run", pipe(EVENTS), EVENTS, "is no file"),
        ("run", swap(STATE), RECORD, "is damaged, or of another run"),
        ("run", swap(STATE, RECORD), STATE, "holds a Record and no checkpoint"),
        ("run", cut(RECORD), RECORD, "is damaged"),
        ("run", flip(RECORD), RECORD, "is damaged"),
        ("run", lose(RECORD), RECORD, "is missing"),
        ("run", occupy(RECORD), RECORD, "Is a directory"),
        ("run", swap(RECORD), RECORD, "is damaged, or of another run"),
        ("run", swap(RECORD, "log/000002.record"), RECORD, "is damaged, or of another run"),
        ("run", cut(CLIENT), CLIENT, "is damaged"),
        ("run", flip(CLIENT), CLIENT, "is damaged"),
        ("run", lose(CLIENT), CLIENT, "is missing"),
        ("run", occupy(CLIENT), CLIENT, "Is a directory"),
        ("run", swap(CLIENT, "last"), CLIENT, "it is that of"),
        ("run", lose(EVENTS), EVENTS, "is missing"),
        ("run", flip(EVENTS, 0), EVENTS, "line 1 is not JSON"),
        ("run", occupy(EVENTS), EVENTS, "Is a directory"),
        ("run", without(EVENTS, '"round": 1,'), EVENTS, "no round 1"),
        ("run", without(EVENTS, '"round"'), EVENTS, "ends with round 0"),
        ("run", swap(EVENTS), "recipe.toml", "is not the one that the run in"),
        ("run", replace_text(EVENTS, '"bytes_up"', '"bytes_uq"'), EVENTS, "is damaged (KeyError: 'bytes_up')"),
        ("run", lose("recipe.toml"), "recipe.toml", "is missing"),
        ("run", cut("recipe.toml"), "recipe.toml", "cannot be used"),
        ("run", cut("summary.json"), "summary.json", "remove it"),
        ("run", occupy("summary.json"), "summary.json", "Is a directory"),
        ("report", cut("summary.json"), "summary.json", "remove it"),
        ("report", cut("environment.json"), "environment.json", "remove it"),
        ("report", pipe("environment.json"), "environment.json", "is no file"),
        ("report", occupy("recipe.toml"), "recipe.toml", "Is a directory"),
        ("report", without(EVENTS, '"round": 1,'), EVENTS, "no round 1"),
        ("report", replace_text(EVENTS, '"loss"', '"lors"'), EVENTS, "is damaged"),
        ("report", replace_text(EVENTS, '{"event": "interrupted"', '["event"'), EVENTS, "is not JSON"),
        ("export", lose("recipe.toml"), "recipe.toml", "not a run folder"),
        ("export", replace_text("recipe.toml", "seed = 1", "seed = 3"), "recipe.toml", "is not the one that the run"),
        ("export", cut(STATE), STATE, "is damaged"),
        ("export", swap(RECORD), RECORD, "is damaged, or of another run"),
        ("export", lose(EVENTS), EVENTS, "is missing"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_one_line(
    command: str, damage: Damage, file: str, words: str, runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(runs / "stopped", folder)
    (tmp_path / "other").symlink_to(runs / "other")
    path = one(folder, file)
    damage(folder)
    given = {
        "run": ("run", runs / "stopped.toml", "--out", folder),
        "report": ("report", folder),
        "export": ("export", folder, "--delta", tmp_path / "delta"),
    }
    code, line = outcome(*given[command])
    assert code in (1, 2) and line.count("\n") == 1, line
    assert str(path) in line or f"has no {path.name}" in line, line
    assert words in line and (RESTORE in line or "remove it" in line or "makes one" in line), line
    assert not (tmp_path / "delta").exists()


def test_stray_files_change_no_bit(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(runs / "stopped", folder)
    for name in ("000002.snapshot", "000001.snapshot", "000003.record", "notes.record", ".000002.record.ab12"):
        shutil.copy(runs / "other" / "log" / "000002.record", folder / "log" / name)
    shutil.copy(one(folder, CLIENT), folder / "state" / "clients" / f"{'0' * 24}.000001.state")
    for name in ("clients", "history"):
        (folder / "state" / name / "notes.state").write_text("mine")
    assert outcome("rewind", folder, "--to", 1) == (0, "")
    assert outcome("run", runs / "stopped.toml", "--out", folder)[0] == 0
    assert (folder / "log" / "000003.record").read_bytes() == (runs / "whole" / "log" / "000003.record").read_bytes()
    assert read(folder).rounds[3].fingerprint == read(runs / "whole").rounds[3].fingerprint != ""
    assert (folder / "state" / "clients" / "notes.state").exists() and (folder / "log" / "notes.record").exists()


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """The folders of a served run ("run") and of a site ("site"), and a recipe, as a server and `join` leave them."""
    pytest.importorskip("flwr")
    pytest.importorskip("cryptography")
    from fedferret.sites import state

    tables = tiny_tables(tmp_path, data={"sites": ["w"]}, clients={"per_round": 1})
    tables["data"] = {"source": "sites", "sites": ["w"]}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables))
    write_run(tmp_path / "run", finished=False)
    (tmp_path / "run" / "recipe.toml").write_text(load(tmp_path / "recipe.toml").to_toml())
    state.write(tmp_path / "run", "server", {"doing": "stopped", "listen": "127.0.0.1:1", "secure": False})
    state.write(tmp_path / "run", "nodes", {"time": 0, "nodes": {"w": {"connected": True}}})
    state.write(tmp_path / "run", "names", {})
    state.write(tmp_path / "run", "sites", {"added": ["v"], "retired": []})
    state.MessageLog(tmp_path / "run").record({"what": "done", "client": "w", "round": 3, "version": 2, "process": 7})
    site = tmp_path / "site"
    site.mkdir(mode=0o700)
    (site / "rows.jsonl").write_text('{"instruction": "The door?", "response": "Red."}\n')
    (site / "site.toml").write_text('name = "w"\n[data]\npath = "rows.jsonl"\n')
    (site / "join.json").write_text('{"doing": "stopped", "name": "w", "address": "127.0.0.1:1"}')
    line = {"what": "done", "round": 3, "framed_bytes": 1000, "time": "2026-11-22T19:02:11"}
    (site / "audit.jsonl").write_text(json.dumps(line) + "\n")
    (site / "logs").mkdir()
    (site / "logs" / "trainer.log").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "damage", "file", "words"),
    [
        ("status run", cut("run/server/server.json"), "run/server/server.json", "`fedferret serve` writes it again"),
        ("status run", occupy("run/server/server.json"), "run/server/server.json", "Is a directory"),
        ("nodes run", cut("run/server/nodes.json"), "run/server/nodes.json", "is damaged"),
        ("nodes run", lock("run/server/messages.jsonl"), "run/server/messages.jsonl", "remove it"),
        ("nodes run", occupy("run/server/messages.jsonl"), "run/server/messages.jsonl", "Is a directory"),
        ("status run", cut("run/events.jsonl"), "", ""),
        ("status run", flip("run/events.jsonl", 0), "run/events.jsonl", "line 1 is not JSON"),
        ("status site", cut("site/join.json"), "site/join.json", "`fedferret join` writes it again"),
        ("status site", occupy("site/audit.jsonl"), "site/audit.jsonl", "Is a directory"),
        ("serve", flip("run/events.jsonl", 0), "run/events.jsonl", "line 1 is not JSON"),
        ("serve", occupy("run/events.jsonl"), "run/events.jsonl", "Is a directory"),
        ("serve", lose("run/recipe.toml"), "run/recipe.toml", "is missing"),
        ("serve", cut("run/recipe.toml"), "run/recipe.toml", "cannot be used"),
        ("serve", occupy("run/server/server.json"), "run/server/server.json", "Is a directory"),
        ("serve", cut("run/server/sites.json"), "run/server/sites.json", "give the last `fedferret sites` command"),
        ("serve", occupy("run/server/sites.json"), "run/server/sites.json", "is damaged"),
        ("serve", occupy("run/server/messages.jsonl"), "run/server/messages.jsonl", "remove it"),
        ("join", cut("site/site.toml"), "site/site.toml", "not TOML"),
        ("join", occupy("site/site.toml"), "site/site.toml", "Is a directory"),
        ("join", occupy("site/logs/trainer.log"), "site/logs/trainer.log", "Is a directory"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_server_or_a_site_is_one_line(
    command: str, damage: Damage, file: str, words: str, places: Path
) -> None:
    damage(places)
    verb, _, folder = command.partition(" ")
    options = {
        "serve": (places / "recipe.toml", "--out", places / "run", "--insecure"),
        "join": ("127.0.0.1:1", "--name", "w", "--folder", places / "site", "--insecure"),
    }
    code, line = outcome(verb, *options.get(verb, (places / folder,)))
    if not file:
        assert (code, line) == (0, "")  # a torn last line: a crash's
        return
    assert code in (1, 2) and line.count("\n") == 1, line
    assert str(places / file) in line and words in line, line


def test_lines_that_are_no_records_are_passed_over_and_a_server_writes_its_files_again(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    junk = '\n[]\n7\n{"what": "traffic"}\n{"what": {}}\n{"what": "done"}\n{"what": "socket"}\n\xff\n{"wha'
    for path in (places / "run" / "server" / "messages.jsonl", places / "site" / "audit.jsonl"):
        with path.open("a", encoding="latin-1") as file:
            file.write(junk)
    run = CliRunner().invoke(app, ["nodes", str(places / "run")])
    site = CliRunner().invoke(app, ["status", str(places / "site")])
    assert (run.exit_code, site.exit_code) == (0, 0), (run.exception, site.exception)
    assert "round 3" in run.stdout and "version 2" in run.stdout
    assert "Updates:  1; the last: round 3 at 2026-11-22T19:02:11" in site.stdout
    monkeypatch.setattr("fedferret.sites.serve.Server.run", lambda server: None)
    for name in ("server", "nodes", "names"):
        cut(f"run/server/{name}.json")(places)
    words = ["serve", str(places / "recipe.toml"), "--out", str(places / "run"), "--insecure"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.exception
    for name in ("server", "nodes", "names"):
        assert f"server/{name}.json is damaged" in result.stdout
        assert not (places / "run" / "server" / f"{name}.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": ""}, "states no SHA-256 of the tuned weights"),
        ({"fingerprint": "f" * 64}, "the rebuilt weights have SHA-256"),
        ({"settings": "{"}, "cannot be applied"),
        ({"settings": "7", "method": "fedavg"}, "cannot be applied"),
        ({"objective": "{}"}, "cannot be applied"),
        ({"method": "no such"}, "no method is called"),
        ({"records": (b"garbage",)}, "cannot be applied"),
        ({"records": (), "version": 9}, "cannot be applied"),
        ({"snapshot": codec.encode(7), "version": 9}, "cannot be applied"),
    ],
)
def test_a_delta_that_cannot_be_applied_is_one_line(
    changes: dict[str, Any], words: str, runs: Path, tmp_path: Path
) -> None:
    from fedferret.export import export_delta

    delta = runs / "whole.delta"
    known = codec.decode(delta.read_bytes()) if delta.exists() else export_delta(runs / "whole", delta, silent)
    (tmp_path / "delta").write_bytes(codec.encode(replace(known, **changes)))
    code, line = outcome("apply", "tiny", tmp_path / "delta", "--to", tmp_path / "model")
    assert code in (1, 2) and line.count("\n") == 1 and words in line, line
    assert not (tmp_path / "model").exists()


def test_a_flipped_bit_of_the_events_is_one_line_or_another_figure(tmp_path: Path) -> None:
    write_run(tmp_path)
    content = (tmp_path / EVENTS).read_bytes()
    refused = 0
    for place in range(7, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / EVENTS).write_bytes(bytes(damaged))
        code, line = outcome("report", tmp_path)
        assert (code, line.count("\n")) in ((0, 0), (1, 1), (2, 1)), (line, content[place - 20 : place + 5])
        refused += code != 0
    assert refused > 20


@pytest.mark.parametrize("name", ["recipe.toml", "state", "log", "state/run.state", "log/000001.record", EVENTS])
@pytest.mark.parametrize("command", ["export", "rewind"])
def test_no_link_out_of_a_runs_folder_is_followed(command: str, name: str, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(runs / "stopped", folder)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    options = ("--delta", tmp_path / "delta") if command == "export" else ("--to", 1)
    code, line = outcome(command, folder, *options)
    assert code == 2 and f"{name} is a link that leads out of" in line and line.count("\n") == 1, line
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize("name", ["runs/a/seed-1", "runs/a/seed-1.json", "runs/a/seed-1/events.jsonl", "plots"])
def test_a_comparison_follows_no_link_out_of_its_folder_and_names_damage(name: str, tmp_path: Path) -> None:
    grid, out = written_grid(tmp_path, ["A"], seeds=[1]), tmp_path / "out"
    for cell in grid.cells(out):
        write_cell(cell, {0: 5.0, 2: 4.0})
    (out / "grid.toml").write_text(grid.to_toml())
    (out / "plots").mkdir()
    path = out / name
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    words = ("compare", out / "grid.toml", "--out", out, "--table-only")
    code, line = outcome(*words)
    assert code == 2 and f"{path} is a link that leads out of" in line and line.count("\n") == 1, line
    path.unlink()
    if name.endswith(("json", "jsonl")):
        path.write_text("{")
        if name.endswith("jsonl"):
            path.write_text("{\n")
        code, line = outcome(*words)
        assert code == 2 and str(path) in line and line.count("\n") == 1, line
