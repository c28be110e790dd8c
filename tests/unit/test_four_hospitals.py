"""The example of four hospitals with the tiny model, then a second run under its certificates, with real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import fedferret
from fedferret.cli import app
from fedferret.core.errors import UserError
from fedferret.tracking.events import read

pytest.importorskip("flwr")
pytest.importorskip("chitchat_dataset")
pytestmark = pytest.mark.slow(seconds=240)

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


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's script as a module."""
    specification = importlib.util.spec_from_file_location("four_hospitals", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "four_hospitals", module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    specification.loader.exec_module(module)
    return module


def test_a_site_and_the_server_are_killed_and_sites_come_and_go_in_a_second_run(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'forger'}:{Path(fedferret.__file__).parents[1]}")
    out.mkdir()
    with example.federation(out, True) as hospitals:
        example.run(hospitals)
        assert_finished(out)
        second_run(hospitals)
    assert not processes_with(str(out))


def assert_finished(out: Path) -> None:
    """What the example leaves."""
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


def second_run(hospitals: Any) -> None:
    """The sites' processes keep running. ward-3 is gone: the server waits for it until it is retired."""
    out, log = hospitals.out, hospitals.out / "server.log"
    hospitals.kill("ward-3")
    log.rename(out / "first-server.log")
    changes = ('data.sites=["ward-1", "ward-2", "ward-3"]', "clients.per_round=3", "clients.min_clients=2", "rounds=1")
    hospitals.folder, hospitals.began = "second", time.monotonic()
    hospitals.settings += [word for change in changes for word in ("--set", change)]
    hospitals.start("server")
    hospitals.wait("the second run", lambda: "Sites call" in log.read_text())
    assert "issued before" in sites(hospitals.run, "add", "ward-4")
    hospitals.wait("ward-4", lambda: "ward-4 is connected" in log.read_text())
    assert "Revoked:" in sites(hospitals.run, "retire", "ward-2")
    refused = "refuses the certificate of ward-2"  # certain while the server waits for ward-3: the site tries on
    hospitals.wait("the end of ward-2", lambda: refused in (out / "ward-2.log").read_text())
    sites(hospitals.run, "retire", "ward-3")
    assert "that leaves 1 sites, and clients.min_clients=2" in sites(hospitals.run, "retire", "ward-1")
    hospitals.wait("the end", lambda: hospitals.processes["server"].poll() == 0)
    run, left = read(hospitals.run), ("ward-1", "ward-4")
    assert [(each.clients, tuple(sorted(each.bytes_up))) for each in run.rounds.values()] == [(left, left)]
    assert [(each.round, each.added, each.retired) for each in run.lists] == [(1, ("ward-4",), ("ward-2", "ward-3"))]
    assert len(list((out / "sites" / "ward-1" / "runs").iterdir())) == 2


def sites(run: Path, verb: str, name: str) -> str:
    """The output of `fedferret sites`."""
    return CliRunner().invoke(app, ["sites", verb, str(run), name]).output


def processes_with(word: str) -> list[str]:
    """The command lines of running processes that have ``word``."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if word in line and "ps -eo" not in line]
