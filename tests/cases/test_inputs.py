"""The inputs of ``inputs/``, each through the command line: what is said, and whether the run ends well.

``inputs/base.toml`` is the recipe. ``test_malformed.py`` has the faults of files beside these.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedferret.cli import app

pytestmark = pytest.mark.slow(seconds=5)

INPUTS = Path(__file__).parent / "inputs"

REFUSED = {  # the input, settings beside it, and the one line
    "nan-input.jsonl": ([], r'row 1: column "input" holds NaN, not a text.*data\.faulty_rows = "skip"'),
    "list-response.jsonl": ([], r'row 1: column "response" holds a list, not a text'),
    "surrogate.jsonl": ([], r'row 1: column "response" holds half of a character'),
    "lines-in-json.json": ([], r"one object per line.*ends in \.jsonl"),
    "semicolons.csv": ([], r'\(delimiter ";"\): no held-out example is left'),
    "one-row-clients.jsonl": (
        ["data.client_column=client"],
        r"each client keeps at least one row and none has two: give other rows with data\.held_out_path",
    ),
}
READ = {  # the input, settings beside it, and what is said
    "one-row-clients.jsonl": ([], 'not read: column "client"'),
    "math-categories.jsonl": ([], "2 clients|plain"),
    "long-response.jsonl": ([], "cuts, of all 20 examples, 20 at the end of the response"),
    "openai-weights.jsonl": ([], 'read as: conversational, column "messages"'),
    "sharegpt.jsonl": ([], 'read as: conversational, column "conversations"'),
    "tool-calls.jsonl": ([], 'read as: conversational, column "messages"'),
    "content-parts.jsonl": ([], 'read as: conversational, column "messages"'),
    "prompt-completion.jsonl": ([], "read as: prompt and completion"),
    "system-role.jsonl": (
        [f"text.template={INPUTS / 'system-refusing.jinja'}"],
        "takes no such system turn: its text goes before the next turn of the user",
    ),
}
QUICK = ["evaluation.local_only_clients=0", "algorithm.training.steps=1"]


def run(name: str, out: Path, settings: list[str]) -> tuple[int, str, str]:
    """The exit code of a run on an input, what it printed, and its errors."""
    given = [f"data.path={INPUTS / name}", *QUICK, *settings]
    words = ["run", str(INPUTS / "base.toml"), "--out", str(out), *(each for text in given for each in ("--set", text))]
    result = CliRunner().invoke(app, words)
    assert "Traceback" not in result.output and (not result.exception or isinstance(result.exception, SystemExit))
    return result.exit_code, " ".join(result.stdout.split()), result.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_an_input_that_cannot_be_used_is_one_line(name: str, tmp_path: Path) -> None:
    settings, line = REFUSED[name]
    code, _, error = run(name, tmp_path / "run", settings)
    assert code == 2 and error.count("fedferret: ") == 1 and re.search(line, error), error
    assert error.splitlines()[-1].startswith("fedferret: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", READ)
def test_an_input_is_read_and_how_is_said(name: str, tmp_path: Path) -> None:
    settings, said = READ[name]
    code, printed, error = run(name, tmp_path / "run", settings)
    assert code == 0, error
    assert re.search(said, printed), printed


def test_rows_of_no_use_are_left_out_counted_and_said(tmp_path: Path) -> None:
    good = '{"instruction": "hi", "response": "yes"}\n'
    path = tmp_path / "rows.jsonl"
    path.write_text(good * 20 + (INPUTS / "nan-input.jsonl").read_text())
    code, printed, _ = run(str(path), tmp_path / "run", ["data.faulty_rows=skip"])
    assert code == 0
    assert re.search(
        r'20 rows are left out of 40 \(row 21, row 22, row 23, …\); the first: .*column "input" holds NaN', printed
    )
    assert "held-out rows are trained on too" in printed
    code, _, error = run("nan-input.jsonl", tmp_path / "other", ["data.faulty_rows=skip"])
    assert code == 2 and "every row is faulty, so none is left" in error


@pytest.mark.parametrize("name", ["parts-only.jinja", "dated.jinja"])
def test_a_template_that_writes_no_content_or_a_date_is_refused_or_said(name: str, tmp_path: Path) -> None:
    settings = [f"text.template={INPUTS / name}"]
    code, _, error = run("math-categories.jsonl", tmp_path / "run", settings)
    assert code == 0 if name == "parts-only.jinja" else code == 2 and "text.date" in error, error
