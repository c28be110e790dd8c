"""Commands with paths and values that cannot be: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from fedferret.cli import app
from tiny_runs import tiny_tables

pytestmark = pytest.mark.slow(seconds=14)

PLACES = (
    "file",
    "dir",
    "broken",
    "loop",
    "n" * 300,
    "file/x",
    "dir/\udcff",
    "pipe",
    "",
    "/proc/none/x",
    "a\x1b[31m\n",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a grid, and things that are not what a command wants."""
    folder = tmp_path_factory.mktemp("malformed")
    tables = tiny_tables(folder, rounds=1)
    (folder / "recipe.toml").write_text(tomli_w.dumps(tables))
    (folder / "grid.toml").write_text(tomli_w.dumps({**tables, "seeds": [1], "methods": [{"label": "a"}]}))
    (folder / "file").write_text("no file of ours")
    (folder / "dir").mkdir()
    (folder / "dir" / "theirs").write_text("kept")
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    return folder


def refused(root: Path, *words: str | Path) -> str:
    """The one line of a command that is refused with nothing left."""
    before = sorted(map(str, root.rglob("*")))
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    line = result.stderr
    assert result.exit_code == 2, (words, result.exit_code, line)
    assert line.startswith("fedferret: ") and line.count("\n") == 1 and len(line) < 1100, (words, line)
    assert line.strip().isprintable(), (words, line)
    assert sorted(map(str, root.rglob("*"))) == before, words
    return line


@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_is_not_what_a_command_reads_is_one_line(root: Path, place: str) -> None:
    path = root / place if place and not place.startswith("a") else place
    readers = [
        ["show", path],
        ["run", path, "--out", root / "out"],
        ["report", path],
        ["export", path, "--delta", root / "out"],
        ["apply", "tiny", path, "--to", root / "out"],
        ["rewind", path, "--to", "0"],
        ["compare", path, "--out", root / "out"],
        ["nodes", path],
        ["status", path],
        ["sites", "list", path],
        ["sites", "retire", path, "x"],
        ["pki", "show", "--pki", path],
        ["serve", path, "--insecure", "--out", root / "out"],
    ]
    for name in ("data.path", "data.held_out_path", "text.template"):
        readers.append(["show", root / "recipe.toml", "--set", f"{name}={json.dumps(str(path))}"])
        readers.append(["show", root / "recipe.toml", "--set", f"{name}={json.dumps(place + chr(0))}"])
    for words in readers:
        refused(root, *words)


@pytest.mark.parametrize("place", ["file", "dir", "loop", "n" * 300, "file/x", "pipe", "/proc/none/x"])
def test_a_place_where_nothing_can_be_written_is_one_line(root: Path, place: str) -> None:
    path = root / place if not place.startswith("a") else place
    refused(root, "run", root / "recipe.toml", "--out", path)
    refused(root, "compare", root / "grid.toml", "--out", path, "--table-only")
    refused(root, "join", "127.0.0.1:1", "--name", "a", "--insecure", "--folder", path, "--data", root / "no")


VALUES = ("3", '"x"', "[1]", "{a=1}", "1979-05-27", "nan", "-1", "9" * 5000, "[" * 3000, '"\\u001b[31m"', "[[[]]]")
TABLES = ("model", "data", "objective", "text", "clients", "algorithm", "pool", "evaluation", "execution")
SETTINGS = ("seed", "rounds", "model.name", "data.source", "data.partition", "text.max_tokens", "clients.per_round")
SETTINGS += ("algorithm.name", "algorithm.training", "pool.kind", "evaluation.metrics", "execution.engine")


@pytest.mark.parametrize("name", [*TABLES, *SETTINGS])
def test_a_value_of_another_type_is_one_line(root: Path, name: str) -> None:
    valid = {"seed": ("3",), "rounds": ("3",), "clients.per_round": ("3",)}.get(name, ())
    for value in VALUES:
        if value not in valid:
            refused(root, "show", root / "recipe.toml", "--set", f"{name}={value}")


@pytest.mark.parametrize(
    "text", ["a = 1\na = 2", "[a]\n[a]", "x = " + "[" * 5000, "x = " + "9" * 6000, "model = 1", "\0"]
)
def test_a_recipe_that_is_no_toml_is_one_line(root: Path, text: str) -> None:
    path = root / "dir" / "theirs"
    path.write_text(text)
    for words in (["run", path, "--out", root / "out"], ["compare", path, "--out", root / "out"]):
        refused(root, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["run", ""],
        ["report", ""],
        ["export", "run", "--to", ""],
        ["export", "run", "--delta="],
        ["compare", "grid.toml", "--out", " ", "--table-only"],
        ["join", "127.0.0.1:1", "--name", "a", "--insecure", "--data", ""],
        ["pki", "issue", "x", "--pki", ""],
        ["sites", "list", ""],
    ],
)
def test_an_empty_value_is_never_the_working_folder(
    root: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert "there is an empty value after " in refused(root, *words)
