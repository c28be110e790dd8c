"""The example of four hospitals with the tiny model: all processes are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedferret
from fedferret.core.errors import UserError
from fedferret.tracking.events import read

pytest.importorskip("flwr")
pytest.importorskip("chitchat_dataset")
pytestmark = pytest.mark.slow(seconds=190)

# ward-2's trainer signs its first response wrongly, as whoever posed as ward-2 would
FORGER = """
import sys
if "fedferret.sites.resident" in sys.orig_argv and any("ward-2" in word for word in sys.orig_argv):
    from fedferret.sites import signing
    close, forged = signing._close, []
    def first_forged(key, direction, certificate, message):
        sealed = close(key, direction, certificate, message)
        if forged:
            return sealed
        forged.append(sealed)
        return sealed[:-1] + bytes([sealed[-1] ^ 1])
    signing._close = first_forged
"""
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "four-hospitals" / "run.py"


def test_a_site_and_the_server_are_killed_and_the_run_ends_with_a_report(tmp_path: Path) -> None:
    from fedferret.sites.proxy import find_nginx

    try:
        find_nginx()
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    out = tmp_path / "four"
    (tmp_path / "forger").mkdir()
    (tmp_path / "forger" / "sitecustomize.py").write_text(FORGER)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--out", out],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'forger'}:{Path(fedferret.__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = read(out / "run")
    assert run.status == "finished" and run.done == 5
    replies = {number: len(each.bytes_up) for number, each in run.rounds.items()}
    assert replies[1] == 4 and replies[2] == 3 and max(replies[4], replies[5]) == 4  # ward-3 came back
    assert [failure.client for failure in run.rounds[2].failures] == ["ward-3"]
    dropped = "ward-2: the signature is not the site's; dropped, and its request is sent again"
    assert dropped in (out / "server.log").read_text(), "and its true response counted in round 1"
    losses = [evaluation.loss for _, evaluation in sorted(run.evaluations.items())]
    assert losses[-1] < losses[0]
    assert (out / "run" / "report.html").exists()
    for site in ("ward-1", "ward-3"):
        audit = [json.loads(line) for line in (out / "sites" / site / "audit.jsonl").read_text().splitlines()]
        assert {event["round"] for event in audit if event["what"] != "socket"} >= {1, 5}
    assert not processes_with(str(out))


def processes_with(word: str) -> list[str]:
    """The command lines of running processes that have ``word``."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if word in line and "ps -eo" not in line]
