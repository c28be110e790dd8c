"""Flower as the transport: the grid's behaviour on a stand-in. ``test_flower_federation.py`` has real processes."""

from __future__ import annotations

import itertools
import json
import time
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from federation import write_recipe
from fedferret.cli import app
from fedferret.engines.flower import GRACE, REPEATS, SENDINGS, FlowerTransport, Roster, Traffic
from fedferret.engines.flower_link import Announced, Unavailable
from fedferret.engines.flower_records import content_of, records_of
from fedferret.engines.flower_relay import deliver
from fedferret.engines.flower_reply import Malformed, read_reply
from fedferret.sites import join as joining
from fedferret.sites.flower_process import environment
from fedferret.sites.package import run_package

pytestmark = pytest.mark.usefixtures("task_identity")


class Grid:
    """A link to a SuperLink in memory: ``site(node, message)`` returns bytes, an error, objects, or None for no reply.

    Objects are a root's name and the contents that were uploaded, by name.
    """

    def __init__(self, site: Any, nodes: Iterable[tuple[int, str]] = ((7, "ward-1"), (8, "ward-2"))) -> None:
        self.site, self.online = site, [SimpleNamespace(node_id=n, name=s, registered_at=str(n)) for n, s in nodes]
        self.pushed: list[tuple[int, bytes | None, float]] = []
        self.waiting: dict[str, Message] = {}
        self.objects: dict[str, bytes] = {}
        self.numbers = itertools.count()

    def nodes(self, seconds: float) -> list[Any]:
        return self.online

    def push(self, message: Message, seconds: float) -> str:
        message.metadata.__dict__["_message_id"] = f"message {next(self.numbers)}"
        self.pushed.append((message.metadata.dst_node_id, content_of(message)[0], message.metadata.ttl))
        self.waiting[message.metadata.message_id] = message
        return message.metadata.message_id

    def announced(self, identifier: str, seconds: float) -> list[Announced]:
        message = self.waiting[identifier]
        reply = self.site(message.metadata.dst_node_id, content_of(message)[0])
        if reply is None:
            return []
        root, objects = reply if isinstance(reply, tuple) else objects_of(reply, message)
        self.objects |= objects
        return [Announced(root, identifier)]

    def fetch(self, identifier: str, seconds: float) -> bytes:
        if identifier not in self.objects:
            raise Unavailable("not there")
        return self.objects[identifier]

    def discard(self, root: str, seconds: float) -> None:
        self.objects.pop(root, None)


def objects_of(reply: bytes | Error, message: Message) -> tuple[str, dict[str, bytes]]:
    """A reply as a site's Flower uploads it."""
    whole = Message(reply if isinstance(reply, Error) else records_of(reply), reply_to=message)
    return whole.object_id, {name: part.deflate() for name, part in get_all_nested_objects(whole).items()}


def exchange(grid: Grid, messages: dict[str, bytes], deadline: float = 5.0) -> dict[str, tuple[bytes | None, str]]:
    found = {}
    roster = Roster(grid, ["ward-1", "ward-2"])  # type: ignore[arg-type]  # has the methods that are used
    for received in FlowerTransport(grid, roster, poll=0.01).exchange(messages, deadline):  # type: ignore[arg-type]
        assert received.site not in found, "one Received per site"
        found[received.site] = (received.content, received.reason)
    return found


MESSAGES = {"ward-1": b"to one", "ward-2": b"to two"}


def test_messages_go_to_their_sites_and_replies_come_back() -> None:
    grid = Grid(lambda node, message: message + b" from %d" % node)
    assert exchange(grid, MESSAGES) == {"ward-1": (b"to one from 7", ""), "ward-2": (b"to two from 8", "")}
    assert [(node, message) for node, message, _ in grid.pushed] == [(7, b"to one"), (8, b"to two")]
    assert all(0 < seconds <= 5.0 + GRACE for _, _, seconds in grid.pushed), "a message expires after the deadline"


def test_nodes_that_are_not_approved_are_sent_nothing() -> None:
    grid = Grid(lambda node, message: b"yes", [(7, "ward-1"), (9, "stranger"), (10, "")])
    assert exchange(grid, MESSAGES) == {"ward-1": (b"yes", ""), "ward-2": (None, "not connected")}
    assert [node for node, _, _ in grid.pushed] == [7]


def test_a_site_that_does_not_reply_costs_the_deadline_and_no_more() -> None:
    grid = Grid(lambda node, message: b"yes" if node == 7 else None)
    started = time.monotonic()
    assert exchange(grid, MESSAGES, 0.5) == {"ward-1": (b"yes", ""), "ward-2": (None, "no reply before the deadline")}
    assert 0.4 < time.monotonic() - started < 5


def test_a_lost_site_that_is_back_is_sent_its_message_again_while_others_work() -> None:
    lost = iter([Error(ErrorCode.NODE_UNAVAILABLE, "gone"), b"back"])
    slow = iter([None] * 20 + [b"done"])
    grid = Grid(lambda node, message: next(slow) if node == 7 else next(lost))
    assert exchange(grid, MESSAGES) == {"ward-1": (b"done", ""), "ward-2": (b"back", "")}


def test_a_site_that_is_lost_at_every_sending_is_given_up() -> None:
    grid = Grid(lambda node, message: Error(ErrorCode.CLIENT_APP_CRASHED, "crashed"))
    assert exchange(grid, {"ward-1": b"x"}) == {"ward-1": (None, "connection lost")}
    assert len(grid.pushed) == SENDINGS


def test_a_site_that_connects_during_an_exchange_gets_its_message() -> None:
    grid = Grid(lambda node, message: None, [(7, "ward-1")])

    def site(node: int, message: bytes | None) -> bytes | None:
        if len(grid.online) == 1:
            grid.online.append(SimpleNamespace(node_id=8, name="ward-2", registered_at="8"))
            return None
        return b"yes" if len(grid.pushed) == 2 else None

    grid.site = site
    assert exchange(grid, MESSAGES) == {"ward-1": (b"yes", ""), "ward-2": (b"yes", "")}


def head(kind: str, child: str, body: bytes) -> bytes:
    return f"{kind} {child} {len(body)}".encode() + b"\0" + body


CHILD, RECORD = "1" * 64, "2" * 64
RECORDS = head("RecordDict", RECORD, json.dumps({"message": RECORD}).encode())


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ({}, "announced a reply and did not send all of it before the deadline"),
        ({"root": b""}, "no head of ours"),
        ({"root": b"\xff" * 99}, "no head of ours"),
        ({"root": b"Message  " + b"9" * 5000 + b"\0"}, "no head of ours"),
        ({"root": head("Message", "", b"")}, "its Message has no child"),
        ({"root": head("Message", "", b"\xff\xff")}, "body of its Message cannot be parsed"),
        ({"root": head("Message", "", b"x" * (1 << 17))}, "not what it states or too many"),
        ({"root": b"Message  7\0abc"}, "not what it states or too many"),
        ({"root": head("ArrayRecord", "", b"{}")}, "another kind is in the place of its Message"),
        ({"root": head("Message", CHILD, b"")}, "announced a reply and did not send all"),
        ({"root": head("Message", CHILD, b""), CHILD: head("Message", "", b"")}, "in the place of its RecordDict"),
        ({"root": head("Message", CHILD, b""), CHILD: head("RecordDict", "", b"{}")}, "RecordDict has no child"),
        ({"root": head("Message", CHILD, b""), CHILD: head("RecordDict", RECORD, b"[" * 900)}, "one record of ours"),
        ({"root": head("Message", CHILD, b""), CHILD: RECORDS}, "announced a reply and did not send all"),
        (
            {"root": head("Message", CHILD, b""), CHILD: RECORDS, RECORD: head("Array", "", b"")},
            "another kind is in the place of its ConfigRecord",
        ),
        (
            {"root": head("Message", CHILD, b""), CHILD: RECORDS, RECORD: head("ConfigRecord", "", b"\xff")},
            "body of its ConfigRecord cannot be parsed",
        ),
        (
            {"root": head("Message", CHILD, b""), CHILD: RECORDS, RECORD: head("ConfigRecord", "", b"")},
            "does not hold one message of ours",
        ),
    ],
)
def test_a_malformed_reply_is_a_failure_of_its_site_and_the_others_reply_is_there(
    objects: dict[str, bytes], reason: str
) -> None:
    grid = Grid(lambda node, message: b"yes" if node == 8 else ("root", objects))
    found = exchange(grid, MESSAGES, 0.5)
    assert found["ward-2"] == (b"yes", "")
    assert found["ward-1"][0] is None and reason in found["ward-1"][1] and len(found["ward-1"][1]) < 200
    assert "root" not in grid.objects, "what is not read is deleted"


@given(st.binary(max_size=300))
def test_any_bytes_are_a_reply_or_malformed(body: bytes) -> None:
    for objects in (
        {"root": body},
        {"root": head("Message", CHILD, body)},
        {"root": head("Message", CHILD, b""), CHILD: head("RecordDict", RECORD, body)},
        {"root": head("Message", CHILD, b""), CHILD: RECORDS, RECORD: head("ConfigRecord", "", body)},
    ):
        with suppress(Malformed, KeyError):  # KeyError: of an object that is not there
            read_reply("root", objects.__getitem__)


def test_a_reply_that_is_there_at_the_deadline_is_counted() -> None:
    """The caller takes its time over the first reply."""
    grid = Grid(lambda node, message: b"yes")
    received = {}
    transport = FlowerTransport(grid, Roster(grid, ["ward-1", "ward-2"]), poll=0.01)  # type: ignore[arg-type]
    for each in transport.exchange(MESSAGES, 0.3):
        received[each.site] = each.content
        time.sleep(0.5)
    assert received == {"ward-1": b"yes", "ward-2": b"yes"}


def test_a_message_to_which_a_stranger_replied_is_pushed_again_while_others_work() -> None:
    """SuperLink takes one reply to each message: only a new one can have the site's."""
    replies = iter([b"forged", Error(ErrorCode.INVALID_FAB, "forged too"), b"true"])
    slow = iter([None] * 9 + [b"done"])
    recorded: list[Traffic] = []
    grid = Grid(lambda node, message: next(slow) if node == 7 else next(replies))
    roster = Roster(grid, ["ward-1", "ward-2"])  # type: ignore[arg-type]
    seen = []
    for received in FlowerTransport(grid, roster, recorded.append, 0.01).exchange(MESSAGES, 60):  # type: ignore[arg-type]
        seen.append((received.site, received.content))
        if received.site == "ward-2" and received.content != b"true":
            assert received.again("forged")
    assert seen == [("ward-2", b"forged"), ("ward-2", None), ("ward-2", b"true"), ("ward-1", b"done")]
    assert [message for node, message, _ in grid.pushed if node == 8] == [b"to two"] * 3
    assert sum(each.payload_down for each in recorded if each.site == "ward-2") == 3 * len(b"to two")


def test_lost_connections_that_a_stranger_reports_cost_the_site_no_answer() -> None:
    """Nobody signs an error: after as many as a site may have, whoever asks decides whether to go on."""
    replies = iter([Error(ErrorCode.CLIENT_APP_CRASHED, "forged")] * SENDINGS + [b"true"])
    grid = Grid(lambda node, message: next(replies))
    seen = []
    for received in FlowerTransport(grid, Roster(grid, ["ward-2"]), poll=0.001).exchange({"ward-2": b"x"}, 60):  # type: ignore[arg-type]
        seen.append(received.content)
        if received.content is None:
            assert received.again("forged")
    assert seen == [None, b"true"]


def test_a_stranger_without_end_is_given_up_and_so_is_one_at_the_deadline() -> None:
    grid = Grid(lambda node, message: b"forged" if node == 7 else None)
    roster = Roster(grid, ["ward-1", "ward-2"])  # type: ignore[arg-type]
    for sent, deadline in (({"ward-1": b"x"}, 60.0), (MESSAGES, 0.3)):
        pushed = len(grid.pushed)
        for received in FlowerTransport(grid, roster, poll=0.001).exchange(sent, deadline):  # type: ignore[arg-type]
            more = received.again("forged")
            assert not more or received.site == "ward-1"
        assert len(grid.pushed) - pushed <= REPEATS + len(sent)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Error(ErrorCode.INVALID_FAB, "refused: another package"), "refused: another package"),
        (Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the trainer gave no reply"), "the trainer gave no reply"),
        (Error(ErrorCode.INVALID_FAB, "\x1b[31mred\n" + "x" * 60_000), "�[31mred " + "x" * 291),
    ],
)
def test_an_error_in_words_is_the_reason(error: Error, reason: str) -> None:
    assert exchange(Grid(lambda node, message: error), {"ward-1": b"x"}) == {"ward-1": (None, reason)}


def test_a_reply_without_a_message_is_a_failure() -> None:
    message = Message(RecordDict(), 7, "train")
    assert content_of(message) == (None, "the reply holds no message")


def test_bytes_are_counted_with_and_without_framing() -> None:
    recorded: list[Traffic] = []
    grid = Grid(lambda node, message: b"y" * 50)
    roster = Roster(grid, ["ward-1"])  # type: ignore[arg-type]
    list(FlowerTransport(grid, roster, recorded.append, 0.01).exchange({"ward-1": b"x" * 100}, 5))  # type: ignore[arg-type]
    (traffic,) = recorded
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


def test_without_keys_a_node_is_asked_again_once_its_site_was_added_and_no_more_believed_when_it_was_retired() -> None:
    grid = Grid(lambda node, message: b"ward-2", [(8, "")])
    roster = Roster(grid, ["ward-1"], asks=True)  # type: ignore[arg-type]
    for _ in range(SENDINGS + 2):
        assert roster() == {}
    assert len(grid.pushed) == SENDINGS
    roster.approve(["ward-1", "ward-2"])
    roster()
    assert roster() == {"ward-2": 8}
    roster.approve(["ward-1"])
    assert roster() == {}


def test_the_run_package_holds_no_code_and_is_the_same_everywhere() -> None:
    package = run_package()
    assert package == run_package() and len(package) < 1000
    with zipfile.ZipFile(BytesIO(package)) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        for entry in archive.infolist():  # these depend on the machine, the day or the build of Python
            assert (entry.date_time[0], entry.compress_type, entry.create_system) == (1980, zipfile.ZIP_STORED, 3)


def test_every_process_has_an_environment_without_telemetry_and_installation(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    assert {name: variables[name] for name in variables if name.startswith("FLWR")} == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(tmp_path),
    }


def test_a_message_waits_for_a_trainer_until_it_expires(tmp_path: Path) -> None:
    started = time.time()
    with pytest.raises(FileNotFoundError):
        deliver(b"x", tmp_path / "trainer.sock", started + 1.2)
    assert 0.5 < time.time() - started < 20


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serve", "RECIPE", "--listen", "0.0.0.0:8443", "--insecure"], "--listen 0.0.0.0:8443 without certificates"),
        (["serve", "RECIPE"], "there are no certificates"),
        (
            ["serve", "RECIPE", "--insecure", "--listen", "here"],
            '"here": give a host name or an IP address, and a port',
        ),
        (["serve", "RECIPE", "--insecure", "--set", "data.source=files"], "data"),
        (["join", "fed.example.org:8443", "--name", "w", "--insecure"], "--insecure to fed.example.org:8443"),
        (["join", "127.0.0.1:8443", "--name", "w"], "no certificates"),
        (["join", "127.0.0.1:8443", "--name", "w", "--insecure"], "--data is missing"),
        (["join", "127.0.0.1:8443", "--name", "W 1", "--insecure"], "cannot be the name of a site"),
        (["nodes", "runs/none"], "no server was started"),
        (["status", "runs/none"], "not the folder of a served run or of a site"),
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


def test_why_a_server_refuses_a_site_is_said_and_a_wrong_clock_has_the_limits_that_flower_has() -> None:
    from flwr.supercore.constant import MAX_TIMESTAMP_DIFF_SECONDS, MIN_TIMESTAMP_DIFF_SECONDS

    assert (joining.SIGNED_BEFORE, -joining.SIGNED_AHEAD) == (MAX_TIMESTAMP_DIFF_SECONDS, MIN_TIMESTAMP_DIFF_SECONDS)
    settings = joining.JoinSettings(address="fed.example.org:8443", name="w", folder=Path("w"))
    with pytest.raises(httpx.HTTPStatusError) as refused:
        httpx.Response(401, request=httpx.Request("POST", "https://fed.example.org")).raise_for_status()
    line = joining.explain(settings, "SuperNode", 1, f"Failed to initialize the connection.\n{refused.value}")
    assert "clock" in line and "305 s" in line and "5 s ahead" in line and "\n" not in line
    line = joining.explain(settings, "SuperNode", 1, f"SuperNode ID: 7\n{refused.value}")
    assert "it serves another run now; connecting again" in line and "clock" not in line
    line = joining.explain(settings, "SuperNode", 1, "Client error '400 Bad Request' for url")
    assert "refuses the certificate of w: it was revoked" in line and "\n" not in line
    assert (
        joining.explain(settings, "relay", 1, "401 Unauthorized") == "The relay ended with code 1; starting it again."
    )
