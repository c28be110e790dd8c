"""Flower as the transport: the grid's odd ways on a stand-in for it, whole federations on real processes."""

from __future__ import annotations

import itertools
import signal
import socket
import statistics
import time
import zipfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from typer.testing import CliRunner

from federation import CountingProxy, Federation, federation, free_port, messages, records, wait, write_recipe
from fedferret import load_recipe, run
from fedferret.cli import app
from fedferret.engines.flower import SENDINGS, FlowerTransport, Roster, Traffic, content_of, records_of
from fedferret.engines.flower_relay import deliver
from fedferret.sites.flower_process import environment
from fedferret.sites.package import run_package
from fedferret.sites.pki import Authority
from fedferret.tracking import events
from fedferret.tracking.audit import read_audit
from unit.outside import needs_nginx

pytestmark = pytest.mark.usefixtures("task_identity")


class Grid:
    """A grid in memory: ``site(node, message)`` answers with bytes, an error, or None for silence."""

    def __init__(self, site: Any, nodes: Iterable[tuple[int, str]] = ((7, "ward-1"), (8, "ward-2"))) -> None:
        self.site, self.nodes = site, [SimpleNamespace(node_id=n, name=s, registered_at=str(n)) for n, s in nodes]
        self.pushed: list[tuple[int, bytes | None, float]] = []
        self.waiting: dict[str, Message] = {}
        self.numbers = itertools.count()

    def get_nodes(self) -> list[Any]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message {next(self.numbers)}"
            self.pushed.append((message.metadata.dst_node_id, content_of(message)[0], message.metadata.ttl))
            self.waiting[message.metadata.message_id] = message
            identifiers.append(message.metadata.message_id)
        return identifiers

    def pull_messages(self, identifiers: Iterable[str]) -> Iterator[Message]:
        for identifier in list(identifiers):
            if identifier in self.waiting:
                message = self.waiting[identifier]
                answer = self.site(message.metadata.dst_node_id, content_of(message)[0])
                if answer is not None:
                    del self.waiting[identifier]
                    content = answer if isinstance(answer, Error) else records_of(answer)
                    yield Message(content, reply_to=message)


def exchange(grid: Grid, messages: dict[str, bytes], deadline: float = 5.0) -> dict[str, tuple[bytes | None, str]]:
    found = {}
    roster = Roster(grid, ["ward-1", "ward-2"])  # type: ignore[arg-type]  # what is used of a grid
    for received in FlowerTransport(grid, roster, poll=0.01).exchange(messages, deadline):  # type: ignore[arg-type]
        assert received.site not in found, "one delivery per site"
        found[received.site] = (received.content, received.reason)
    return found


LETTERS = {"ward-1": b"to one", "ward-2": b"to two"}


def test_letters_go_to_their_sites_and_replies_come_back() -> None:
    grid = Grid(lambda node, message: message + b" from %d" % node)
    assert exchange(grid, LETTERS) == {"ward-1": (b"to one from 7", ""), "ward-2": (b"to two from 8", "")}
    assert [(node, message) for node, message, _ in grid.pushed] == [(7, b"to one"), (8, b"to two")]
    assert all(0 < seconds <= 5.0 for _, _, seconds in grid.pushed), "a letter is void after the deadline"


def test_nodes_that_are_not_approved_are_sent_nothing() -> None:
    grid = Grid(lambda node, message: b"yes", [(7, "ward-1"), (9, "stranger"), (10, "")])
    assert exchange(grid, LETTERS) == {"ward-1": (b"yes", ""), "ward-2": (None, "not connected")}
    assert [node for node, _, _ in grid.pushed] == [7]


def test_a_silent_site_costs_the_deadline_and_no_more() -> None:
    grid = Grid(lambda node, message: b"yes" if node == 7 else None)
    started = time.monotonic()
    assert exchange(grid, LETTERS, 0.5) == {"ward-1": (b"yes", ""), "ward-2": (None, "no answer before the deadline")}
    assert 0.4 < time.monotonic() - started < 5


def test_a_lost_site_that_is_back_is_sent_its_letter_again_while_others_work() -> None:
    lost = iter([Error(ErrorCode.NODE_UNAVAILABLE, "gone"), b"back"])
    slow = iter([None] * 20 + [b"done"])
    grid = Grid(lambda node, message: next(slow) if node == 7 else next(lost))
    assert exchange(grid, LETTERS) == {"ward-1": (b"done", ""), "ward-2": (b"back", "")}


def test_a_site_that_is_lost_at_every_sending_is_given_up() -> None:
    grid = Grid(lambda node, message: Error(ErrorCode.CLIENT_APP_CRASHED, "crashed"))
    assert exchange(grid, {"ward-1": b"x"}) == {"ward-1": (None, "connection lost")}
    assert len(grid.pushed) == SENDINGS


def test_a_site_that_connects_during_an_exchange_gets_its_letter() -> None:
    grid = Grid(lambda node, message: None, [(7, "ward-1")])

    def site(node: int, message: bytes | None) -> bytes | None:
        if len(grid.nodes) == 1:
            grid.nodes.append(SimpleNamespace(node_id=8, name="ward-2", registered_at="8"))
            return None
        return b"yes" if len(grid.pushed) == 2 else None

    grid.site = site
    assert exchange(grid, LETTERS) == {"ward-1": (b"yes", ""), "ward-2": (b"yes", "")}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Error(ErrorCode.INVALID_FAB, "refused: another package"), "refused: another package"),
        (Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the trainer gave no reply"), "the trainer gave no reply"),
    ],
)
def test_an_error_in_words_is_the_reason(answer: Error, reason: str) -> None:
    assert exchange(Grid(lambda node, message: answer), {"ward-1": b"x"}) == {"ward-1": (None, reason)}


def test_a_reply_without_a_letter_is_no_answer() -> None:
    message = Message(RecordDict(), 7, "train")
    assert content_of(message) == (None, "an answer came that carries no letter")


def test_bytes_are_counted_with_and_without_framing() -> None:
    heard: list[Traffic] = []
    grid = Grid(lambda node, message: b"y" * 50)
    roster = Roster(grid, ["ward-1"])  # type: ignore[arg-type]
    list(FlowerTransport(grid, roster, heard.append, 0.01).exchange({"ward-1": b"x" * 100}, 5))  # type: ignore[arg-type]
    (traffic,) = heard
    assert (traffic.payload_down, traffic.payload_up) == (100, 50)
    assert 100 < traffic.framed_down < 1000 and 50 < traffic.framed_up < 1000


def test_of_two_nodes_with_a_name_the_newer_counts_and_a_registered_name_is_not_asked_for() -> None:
    grid = Grid(lambda node, message: b"ward-2", [(7, "ward-1"), (9, "ward-1")])
    assert Roster(grid, ["ward-1"])() == {"ward-1": 9}  # type: ignore[arg-type]
    assert Roster(grid, ["ward-1", "ward-2"], asks=True)() == {"ward-1": 9}  # type: ignore[arg-type]
    assert grid.pushed == []


def test_without_keys_nodes_are_asked_for_their_names_once() -> None:
    grid = Grid(lambda node, message: b"ward-2", [(8, "")])
    assert Roster(grid, ["ward-2"])() == {}  # type: ignore[arg-type]
    roster = Roster(grid, ["ward-2"], asks=True)  # type: ignore[arg-type]
    assert roster() == roster() == {"ward-2": 8}
    assert len(grid.pushed) == 1


def test_the_run_package_holds_no_code_and_is_the_same_everywhere() -> None:
    package = run_package()
    assert package == run_package() and len(package) < 1000
    with zipfile.ZipFile(BytesIO(package)) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        for entry in archive.infolist():  # what depends on the machine, the day or the build of Python
            assert (entry.date_time[0], entry.compress_type, entry.create_system) == (1980, zipfile.ZIP_STORED, 3)


def test_every_process_is_told_to_report_and_fetch_nothing(tmp_path: Path) -> None:
    told = environment(tmp_path)
    assert {name: told[name] for name in told if name.startswith("FLWR")} == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(tmp_path),
    }


def test_a_letter_waits_for_a_trainer_until_it_is_void(tmp_path: Path) -> None:
    started = time.time()
    with pytest.raises(FileNotFoundError):
        deliver(b"x", tmp_path / "trainer.sock", started + 1.2)
    assert 0.5 < time.time() - started < 20


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serve", "RECIPE", "--listen", "0.0.0.0:8443", "--insecure"], "--listen 0.0.0.0:8443 without certificates"),
        (["serve", "RECIPE"], "there are no certificates"),
        (["serve", "RECIPE", "--insecure", "--listen", "here"], '"here": a name or an address and a port'),
        (["serve", "RECIPE", "--insecure", "--set", "data.source=files"], "data"),
        (["join", "fed.example.org:8443", "--name", "w", "--insecure"], "--insecure to fed.example.org:8443"),
        (["join", "127.0.0.1:8443", "--name", "w"], "no certificates"),
        (["join", "127.0.0.1:8443", "--name", "w", "--insecure"], "--data is missing"),
        (["join", "127.0.0.1:8443", "--name", "W 1", "--insecure"], "cannot be the name of a site"),
        (["nodes", "runs/none"], "no server was started"),
        (["status", "runs/none"], "neither a run that was served nor a site's folder"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    recipe = write_recipe(tmp_path, ["ward-1", "ward-2"], 1)
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, [str(recipe) if each == "RECIPE" else each for each in arguments])
    assert outcome.exit_code == 2, outcome.output
    assert line in outcome.output and outcome.output.strip().count("\n") == 0


def join(made: Federation, site: str, address: str, *more: str) -> None:
    made.start(site, "join", address, "--name", site, "--data", f"{site}.jsonl", *more)


@pytest.mark.slow
def test_two_sites_give_the_bits_of_one_process_at_little_cost(tmp_path: Path) -> None:
    sites = ["ward-1", "ward-2"]
    recipe = write_recipe(tmp_path, sites, 4)
    run(load_recipe(recipe), out=tmp_path / "alone", log=lambda line: None)
    with (
        socket.create_server(("127.0.0.1", 0)) as outside,
        federation(
            tmp_path, HTTPS_PROXY=f"http://127.0.0.1:{outside.getsockname()[1]}", HTTP_PROXY="http://127.0.0.1:1"
        ) as made,
    ):
        port = free_port()
        wires = {site: CountingProxy(port) for site in sites}
        made.start("serve", "serve", "run.toml", "--out", "served", "--listen", f"127.0.0.1:{port}", "--insecure")
        for site, wire in wires.items():
            join(made, site, f"127.0.0.1:{wire.port}", "--insecure")
        assert made.end("serve") == 0, made.words("serve")
        served = tmp_path / "served"
        assert records(served) == records(tmp_path / "alone")

        seen = messages(served)
        for site in sites:
            assert len({event["process"] for event in seen if event["client"] == site and "process" in event}) == 1
            assert "round 4" in made_output(made, "nodes", "served", site)
        rounds = events.read(served).rounds.values()
        overheads = [each.seconds - each.seconds_local / len(sites) for each in rounds if each.round > 1]
        print(
            f"a round beyond training: {statistics.median(overheads):.1f} s, {[round(each, 1) for each in overheads]}"
        )

        for site, wire in wires.items():
            audit = list(read_audit(tmp_path / "sites" / site))
            payload = sum(event["payload_bytes"] for event in audit)
            message = sum(event["framed_bytes"] for event in audit)
            traffic = [event for event in seen if event["what"] == "traffic" and event["client"] == site]
            assert message == sum(event["payload_down"] + event["payload_up"] for event in traffic)
            framed_bytes = sum(event["framed_down"] + event["framed_up"] for event in traffic)
            crossed = wire.up + wire.down
            print(
                f"{site}, 4 rounds: payload {payload}, letters {message}, framed {framed_bytes}, socket {crossed} bytes"
            )
            assert 0 < payload < message < framed_bytes < crossed
            assert crossed < 300_000, "kilobytes: no model crosses (its weights alone have 362,496 bytes)"

        outside.setblocking(False)
        with pytest.raises(BlockingIOError):
            outside.accept()  # nothing was reported or fetched
        assert not list(tmp_path.rglob("flower/apps")), "no run package was unpacked"
        for site in sites:
            assert made.signal(site, signal.SIGTERM) == 130
        assert made.running() == []


def made_output(made: Federation, *arguments: str) -> str:
    """The line of a site in `fedferret nodes`."""
    command, folder, site = arguments
    outcome = CliRunner().invoke(app, [command, str(made.folder / folder)], env={"COLUMNS": "200"})
    (line,) = [line for line in outcome.output.splitlines() if line.startswith(site)]
    return line


@pytest.mark.slow
def test_three_sites_with_certificates_give_the_same_bits_whatever_is_killed(tmp_path: Path) -> None:
    needs_nginx()
    sites = ["ward-1", "ward-2", "ward-3"]
    recipe = write_recipe(tmp_path, sites, 6)
    run(load_recipe(recipe), out=tmp_path / "alone", log=lambda line: None)
    authority = Authority.create(tmp_path / "pki", ["localhost"])
    archives = {site: str(authority.issue(site)) for site in sites}
    serve = ("serve", "run.toml", "--out", "served", "--listen", f"127.0.0.1:{free_port()}")
    with federation(tmp_path) as made:
        made.start("serve", *serve)
        for site, archive in archives.items():
            join(made, site, serve[-1].replace("127.0.0.1", "localhost"), "--credentials", archive)
        made.hear("serve", "round 1/6: held-out")
        made.kill("server_app")
        made.kill("resident", "ward-1")
        made.hear("serve", "Resuming after round")
        made.hear("serve", "round 2/6: held-out")
        made.kill("flower-superlink")
        made.kill("client_app", "ward-2")
        made.hear("serve", "Resuming after round", times=2)
        made.hear("serve", "round 3/6: held-out")
        assert made.signal("serve", signal.SIGINT) == 130  # Ctrl-C, and the same command again
        assert not [line for _, line in made.running() if "served" in line]
        made.kill("flower-supernode", "ward-3")
        made.start("serve", *serve)
        assert made.end("serve") == 0, made.words("serve")
        assert records(tmp_path / "served") == records(tmp_path / "alone")
        assert not list(tmp_path.glob("**/.tmp*")), "no torn file"
        made.start("serve", *serve)
        assert made.end("serve") == 0
        assert made.words("serve").strip().endswith("plays it again.\nThe run is finished: served/report.html")
        for site in sites:
            assert made.signal(site, signal.SIGTERM) == 130
            audit = list(read_audit(tmp_path / "sites" / site))
            crossed = sum(event["up_bytes"] + event["down_bytes"] for event in audit if event["what"] == "socket")
            message = sum(event["framed_bytes"] for event in audit if event["what"] != "socket")
            print(f"{site}, by its own audit: letters {message}, sockets {crossed} bytes")
            assert message < crossed
        assert made.running() == []


@pytest.mark.slow
def test_a_killed_supervisor_takes_its_processes_along_and_another_package_is_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path, ["ward-1", "ward-2"], 2, clients={"per_round": 2, "min_clients": 1})
    authority = Authority.create(tmp_path / "pki", ["localhost"])
    archives = {site: str(authority.issue(site)) for site in ("ward-1", "ward-2")}
    port = free_port()
    with federation(tmp_path) as made:
        made.start("serve", "serve", "run.toml", "--out", "served", "--listen", f"127.0.0.1:{port}")
        join(made, "ward-1", f"localhost:{port}", "--credentials", archives["ward-1"])
        join(made, "ward-2", f"localhost:{port}", "--credentials", archives["ward-2"], "--package", "0" * 64)
        assert made.end("serve") == 0, made.words("serve")
        failures = [failure for _, failure in events.read(tmp_path / "served").failures]
        assert {failure.client for failure in failures} == {"ward-2"}
        assert all("refused: the server's run package has SHA-256" in failure.reason for failure in failures)
        heard = {event["what"] for event in read_audit(tmp_path / "sites" / "ward-2")}
        assert heard <= {"socket"}, "its trainer was given nothing"
        assert made.signal("ward-1", signal.SIGKILL) == -signal.SIGKILL
        assert made.signal("ward-2", signal.SIGKILL) == -signal.SIGKILL
        wait(lambda: made.running() == [], lambda: f"left behind: {made.running()}")
