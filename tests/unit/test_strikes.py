"""A message that ends the server's app counts against its site, and against nobody else's starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from typer.testing import CliRunner

from fedferret.cli import app
from fedferret.core.errors import RunError
from fedferret.engines.transport import NoSeal
from fedferret.sites import serve, strikes
from fedferret.sites.serve import FAILED_STARTS, Server, ServeSettings
from fedferret.sites.server_app import AGAIN
from fedferret.sites.strikes import CRASHED, STRIKES, NotingSeal, Reading, unread_sites

MESSAGE = "5" * 64


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "server").mkdir()
    return tmp_path


def ended(run: Path, site: str, code: int = CRASHED) -> tuple[str, int]:
    """A ServerApp ended while it read a message of this site."""
    reading = Reading(run)
    reading.reading("another", "6" * 64)
    reading.reading("")
    reading.reading(site, MESSAGE)
    return strikes.blame(run, code)


def test_a_site_with_three_messages_that_ended_the_server_is_left_unread_until_it_is_readmitted(run: Path) -> None:
    for number in range(STRIKES):
        assert not Reading(run).unread("ward-1")
        assert ended(run, "ward-1") == ("ward-1", number + 1)
    assert unread_sites(run) == ["ward-1"]
    assert "fedferret sites readmit" in Reading(run).unread("ward-1") and not Reading(run).unread("another")
    outcome = CliRunner().invoke(app, ["sites", "readmit", str(run), "ward-1"])
    assert outcome.exit_code == 0 and not Reading(run).unread("ward-1")
    outcome = CliRunner().invoke(app, ["sites", "readmit", str(run), "ward-1"])
    assert outcome.exit_code == 2 and "no message of this site ended the server's app" in outcome.output


def test_the_site_is_left_out_of_one_exchange(run: Path) -> None:
    reading = Reading(run, "site one")
    assert "left out once" in reading.unread("site one") and not reading.unread("ward-2")
    assert reading.unread("site one") == ""


@pytest.mark.parametrize(("code", "blamed"), [(CRASHED, True), (-11, True), (-9, True), (AGAIN, False), (-15, False)])
def test_only_a_fault_while_a_message_is_read_is_blamed_on_its_site(run: Path, code: int, blamed: bool) -> None:
    assert ended(run, "ward-1", code) == (("ward-1", 1) if blamed else ("", 0))
    reading = Reading(run)
    reading.reading("ward-1", MESSAGE)
    reading.reading("")
    assert strikes.blame(run, code) == ("", 0)
    assert strikes.blame(run, code) == ("", 0), "a note counts once"


def test_a_message_of_any_name_can_be_noted(run: Path) -> None:
    reading = Reading(run)
    reading.reading("ward-1", "\x1b[31m" * 10_000)
    assert strikes.blame(run, CRASHED) == ("ward-1", 1)


class Stamp(NoSeal):
    """A seal with one key for all."""

    signs = True

    def open(self, sender: str, sealed: bytes) -> bytes:
        if sealed != sender.encode():
            raise ValueError("the signature is not the site's")
        return sealed


def test_a_message_that_the_site_did_not_sign_is_no_strike(run: Path) -> None:
    for sealed, strike in ((None, 0), (b"ward-2", 0), (b"ward-1", 1)):  # not looked at yet, another's, its own
        reading = Reading(run, signed=True)
        reading.reading("ward-1", MESSAGE)
        with suppress(ValueError):
            if sealed is not None:
                NotingSeal(Stamp(), reading).open("ward-1", sealed)
        assert strikes.blame(run, CRASHED) == ("ward-1", strike)
    for message, strike in (("", 2), ("7" * 64, 0)):  # its reply's turn has come; a new message
        reading = Reading(run, signed=True)
        reading.reading("ward-1", MESSAGE)
        assert NotingSeal(Stamp(), reading).open("ward-1", b"ward-1") == b"ward-1"
        reading.reading("")
        reading.reading("ward-1", message)
        assert strikes.blame(run, CRASHED) == ("ward-1", strike)


def served(
    run: Path, monkeypatch: pytest.MonkeyPatch, ends: Iterator[tuple[str, int]], signed: bool = False
) -> tuple[list[str], list[str]]:
    """Serve with a ServerApp that ends so: over which site's message, and with which code. Returns who was left out."""
    logged: list[str] = []
    left_out: list[str] = []

    def once(server: Server) -> int:
        left_out.append(server.left_out)
        site, code = next(ends)
        Reading(run, server.left_out, signed).reading(site, MESSAGE)
        return code

    monkeypatch.setattr(Server, "_once", once)
    monkeypatch.setattr(serve, "check_free", lambda port: None)
    monkeypatch.setattr(serve, "environment", lambda home: {})
    Server(run, ServeSettings(), list, logged.append).run()
    return left_out, logged


def test_one_site_uses_up_its_own_strikes_and_none_of_the_servers_starts(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = ["a", "b", "a", "c", "a", "b", "c", "b", "c"]
    assert len(sites) > FAILED_STARTS
    left_out, logged = served(run, monkeypatch, iter([*((site, CRASHED) for site in sites), ("", 0)]))
    assert left_out == ["", *sites] and unread_sites(run) == ["a", "b", "c"]
    assert any("over message 3 of a. It is left unread" in line for line in logged)


def test_whoever_forges_messages_neither_ends_the_server_nor_has_a_site_left_unread(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = ["a"] * 2 * FAILED_STARTS
    left_out, logged = served(run, monkeypatch, iter([*((site, CRASHED) for site in forged), ("", 0)]), signed=True)
    assert left_out == ["", *forged] and unread_sites(run) == []
    assert any("over a message in the name of a that nobody verified. It is left out once" in line for line in logged)


def test_faults_without_a_message_end_the_server_after_a_few_starts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=f"ended {FAILED_STARTS} times in a row"):
        served(run, monkeypatch, iter([("", CRASHED)] * FAILED_STARTS))
