"""Sites that misbehave against a real `serve`: an honest site's answer is counted in every round, and the run finishes.

One server behind nginx and one honest site, with real processes; every hostile site is a thread that speaks Flower's
fleet API, with a certificate, a node key and a signing key that are the site's own.

    round 1   malformed objects of every kind, and integers that cannot be printed, from a site each
    round 2   a site announces a reply and never sends it; one signs wrongly; one ends the server's app, a third time
    round 3   that site is left unread
"""

from __future__ import annotations

import zlib
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flwr.proto.message_pb2 import Message as MessageProto
from typer.testing import CliRunner

import fedferret
from attack.hostile import Attack, HostileSite, Object, honest
from federation import federation, free_port, write_recipe
from fedferret.cli import app
from fedferret.engines.transport import DONE, Request, Response
from fedferret.sites import state
from fedferret.sites.credentials import read_site
from fedferret.sites.pki import Authority
from fedferret.sites.signing import SiteSeal
from fedferret.tracking import events
from fedferret.wire import codec

pytestmark = pytest.mark.slow(seconds=70)

FATAL = b"ends whoever reads it"
FAULT = f"""
import zlib
real = zlib.crc32
class Unforeseen(BaseException): pass
def crc32(data, *start):
    if {FATAL!r} in bytes(data):
        raise Unforeseen("a fault that nobody knows")
    return real(data, *start)
zlib.crc32 = crc32
"""
NUMBER = 0x1234_5678_9ABC  # a version that is replaced by one of six thousand digits


def response(request: Request, version: int, reply: bytes = b"") -> bytes:
    head = (request.run, request.epoch, request.round, request.ticket, request.client)
    return codec.encode(Response(*head, DONE, version, request.fingerprint, 1, reply, "", b"", request.sequence))


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def digits(request: Request, seal: SiteSeal) -> Object:
    """A version that cannot be printed, rightly signed."""
    content = response(request, NUMBER)[:-4].replace(varint(2 * NUMBER), varint(2 * 10**6000))
    return honest(seal.close(content + zlib.crc32(content).to_bytes(4, "little")))


def message(request: Request, *children: Object) -> Object:
    """A new Message for each request: SuperLink keeps one of each name."""
    proto = MessageProto()
    proto.metadata.group_id = request.ticket
    return Object("Message", proto.SerializeToString(), children)


def bad_body(request: Request, seal: SiteSeal) -> Object:
    last = Object("ConfigRecord", b"\xff" + request.ticket.encode())
    return message(request, Object("RecordDict", f'{{"message": "{last.name}"}}'.encode(), (last,)))


MALFORMED: dict[str, tuple[Attack, str]] = {
    "another-root": (
        lambda request, seal: Object("ConfigRecord", request.ticket.encode()),
        "another kind is in the place of its Message",
    ),
    "another-child": (
        lambda request, seal: message(request, Object("Array", request.ticket.encode())),
        "another kind is in the place of its RecordDict",
    ),
    "empty": (lambda request, seal: message(request), "its Message has no child"),
    "bad-body": (bad_body, "the body of its ConfigRecord cannot be parsed"),
    "digits": (digits, "message holds a number of more than 10 bytes"),
}


def unsigned(request: Request, seal: SiteSeal) -> Object:
    """A right response that another than the site made. It is asked for until the deadline, so in one round."""
    sealed = bytearray(seal.close(response(request, request.version)))
    sealed[10] ^= 1  # within the signature
    return honest(bytes(sealed)) if request.round == 2 else message(request)


def announced(request: Request, seal: SiteSeal) -> Object:
    """All but the last object come; in the other rounds it is malformed at once, which costs no time."""
    kept = Object("ConfigRecord", request.ticket.encode(), withheld=True)
    middle = Object("RecordDict", f'{{"message": "{kept.name}"}}'.encode(), (kept,))
    return message(request, middle) if request.round == 2 else message(request)


def fatal(request: Request, seal: SiteSeal) -> Object:
    return honest(seal.close(response(request, 0, FATAL))) if request.round == 2 else message(request)


def test_whatever_sites_do_the_honest_ones_answer_is_counted_and_the_run_finishes(tmp_path: Path) -> None:
    hostile = {
        **{name: attack for name, (attack, _) in MALFORMED.items()},
        "announced": announced,
        "unsigned": unsigned,
        "fatal": fatal,
    }
    clients, served, port = {"per_round": 1 + len(hostile), "min_clients": 1}, tmp_path / "served", free_port()
    write_recipe(tmp_path, ["honest", *hostile], 3, clients=clients, execution={"deadline": 10.0})
    state.write(served, "strikes", {"fatal": ["a message", "another"]})
    authority = Authority.create(tmp_path / "pki", ["127.0.0.1"])
    archives = {name: authority.issue(name) for name in ("honest", *hostile)}
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT)
    paths = f"{tmp_path / 'fault'}:{Path(fedferret.__file__).parents[1]}"
    with federation(tmp_path, PYTHONPATH=paths) as made, ExitStack() as stack:
        address, own = f"127.0.0.1:{port}", ("--credentials", str(archives["honest"]))
        made.start("serve", "serve", "run.toml", "--out", "served", "--listen", address, "--pki", "pki")
        made.start("honest", "join", address, "--name", "honest", "--data", "honest.jsonl", *own)
        stand = {}
        for name, attack in hostile.items():
            site = HostileSite(port, read_site(archives[name].with_suffix("")), tmp_path / name, attack)
            stand[name] = stack.enter_context(closing(site))
        made.wait_for("serve", "over message 3 of fatal. It is left unread")
        assert "Unread:   fatal is left unread" in CliRunner().invoke(app, ["status", str(served)]).output
        assert made.end("serve") == 0, made.output("serve")
        assert len([each for each in stand["fatal"].asked if each.round == 2]) == 1, "it is not asked again"
    rounds = events.read(served).rounds
    assert [set(record.bytes_up) for record in rounds.values()] == [{"honest"}] * 3
    reasons = [{failure.client: failure.reason for failure in record.failures} for record in rounds.values()]
    for name, (_, words) in MALFORMED.items():
        assert all(words in each[name] for each in reasons), reasons
    assert "the signature is not the site's" in reasons[1]["unsigned"]
    assert "announced a reply and did not send all of it before the deadline" in reasons[1]["announced"]
    assert all("left unread: 3 of its messages ended the server's app" in each["fatal"] for each in reasons[1:])
    assert all(set(each) == set(hostile) and max(map(len, each.values())) < 400 for each in reasons)
    assert "Unforeseen: a fault that nobody knows" in (served / "server" / "server_app.log").read_text()
