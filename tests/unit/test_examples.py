"""The examples do what they say, from a docstring, from the README and from the command line."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from examples import quickstart

ROOT = Path(__file__).resolve().parents[2]


def test_the_quickstart_s_docstring_runs() -> None:
    outcome = doctest.testmod(quickstart)
    assert outcome.failed == 0 and outcome.attempted > 0


@pytest.mark.slow
def test_the_quickstart_runs_from_the_command_line_and_runs_again(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--out", str(tmp_path / "run")]
    outcome = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    quickstart.tune("tiny", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss"][-1] < summary["eval_loss"][0]
    assert summary["bytes_up_per_client_round"] < 1000 and (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_the_readme_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    exec(block, {})
