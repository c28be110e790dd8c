"""Messages name only options that exist: of fedferret's commands, or of another program that the message names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fedferret import cli

SOURCE = Path(__file__).parents[2] / "src" / "fedferret"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
INTERNAL = re.compile(r"python -m fedferret\S*|usage: ")  # a module's own usage line, not a message to an operator
OTHER_PROGRAMS = {  # by a part of the text: the program, or for pip's requirements file the hash
    "pip ": {"--no-deps"},
    "sha256": {"--hash"},
    "git clone": {"--depth", "--branch"},
}


def options_of(command: object) -> set[str]:
    """The options of a command and of its subcommands."""
    found = {
        name for parameter in getattr(command, "params", []) for name in (*parameter.opts, *parameter.secondary_opts)
    }
    for each in getattr(command, "commands", {}).values():
        found |= options_of(each)
    return found | {"--help"}


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of a module with their lines: strings with spaces; without docstrings, except those of commands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    docstrings = (
        {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
        if not path.name.endswith("cli.py")
        else set()
    )
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | pieces:
            text = node.value
        else:
            continue
        if " " in text and not INTERNAL.search(text):
            yield node.lineno, text


def unknown_options(path: Path, known: set[str]) -> list[str]:
    """The places of a module that name an option that does not exist."""
    return [
        f"{path.name}:{line}: {option}"
        for line, text in messages(path)
        for option in OPTION.findall(text)
        if option not in known and not any(part in text and option in theirs for part, theirs in OTHER_PROGRAMS.items())
    ]


def test_every_option_in_a_message_exists() -> None:
    known = options_of(typer.main.get_command(cli.app))
    assert {"--listen", "--credentials", "--retry-failed", "--host"} <= known and "--port" not in known
    places = [place for path in sorted(SOURCE.rglob("*.py")) for place in unknown_options(path, known)]
    assert not places, "\n".join(places)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('raise UserError(f"port {port} is taken: give another one with --port")', ["--port"]),
        ('raise UserError("port is taken: give another one with --listen")', []),
        ('command = [program, "--port", str(port)]', []),
        ('"""The docstring of a module may describe --anything."""', []),
    ],
)
def test_the_check_finds_advice_on_an_option_that_does_not_exist(line: str, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(line)
    assert [place.split()[-1] for place in unknown_options(path, {"--listen"})] == found
