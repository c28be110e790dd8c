"""A site's half: its replica follows the log, survives its restarts, and names whatever does not fit."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from contract.methods import METHODS
from fedferret.core import rounds
from fedferret.core.exchanges import Train
from fedferret.core.log import Log, LogUpdate
from fedferret.core.node import Node
from fedferret.core.rounds import RunState
from fedferret.engines.in_process import InProcess
from fedferret.engines.trainer import Trainer
from fedferret.engines.transport import Request, Response
from fedferret.tracking.audit import Audit, read_audit
from fedferret.wire import codec
from toy_sites import BASE, RECIPE, simulate_sites, sites, toy_trainer
from toys import Simulation, simulate, toy_clients, toy_task

RUN = hashlib.sha256(RECIPE.encode()).hexdigest()
METHOD = METHODS["ferret-error-feedback"]
ROUNDS = 4
DATA = toy_clients()
NUMBERS = itertools.count(1)  # a server never gives two requests one number


class Unfolded(Log):
    """A log whose snapshots are never due: a toy model is smaller than a few entries."""

    def append(self, record: bytes, snapshot_size: int, snapshot: Any) -> None:
        """As if the model were large."""
        super().append(record, 1 << 60, snapshot)


@dataclass
class Server:
    """What a server knows after some rounds: the log, and the hash of its state at each version."""

    log: Log
    fingerprints: list[str]

    def request(self, version: int, since: int = 0, **changes: Any) -> bytes:
        """The request that brings a site from ``since`` to ``version`` and has "a" train in the round after it."""
        request = Request(
            run=RUN,
            epoch=0,
            round=version + 1,
            ticket="t",
            client="a",
            recipe=RECIPE,
            base=BASE,
            version=version,
            fingerprint=self.fingerprints[version],
            snapshot=b"",
            records=self.log.since(since).records[: version - since],
            counted=version,
            counted_epoch=0,
            rebuild=False,
            private=b"",
            body=Train(version + 1),
            sequence=next(NUMBERS),
        )
        return codec.encode(replace(request, **changes))


@pytest.fixture(scope="module")
def server() -> Server:
    node, own = Node.start(toy_task(ROUNDS, METHOD), METHOD, 3, codec)
    state = RunState(node, own, Unfolded())
    fingerprints = [node.fingerprint()]
    for _ in rounds.run(InProcess(DATA, codec), list(DATA), state, rounds.Plan(3, ROUNDS, 3)):
        fingerprints.append(node.fingerprint())
    return Server(state.log, fingerprints)


def ask(trainer: Trainer, message: bytes) -> Response:
    response = codec.decode(trainer.handle(message))
    assert isinstance(response, Response)
    return response


def payload(response: Response) -> bytes:
    """What a response brings, without how long it took."""
    return codec.encode(codec.decode(response.reply).payload)


def trainer(folder: Path | None, **options: Any) -> Trainer:
    return toy_trainer(METHOD, ROUNDS, {"a": DATA["a"]}, folder, "a", **options)


def test_an_answer_depends_on_nothing_but_the_order_and_the_sites_own_past(server: Server, tmp_path: Path) -> None:
    whole = [ask(site, server.request(version)) for site in [trainer(tmp_path / "one")] for version in range(3)]
    restarted = [ask(trainer(tmp_path / "two"), server.request(version)) for version in range(3)]
    assert [payload(response) for response in restarted] == [payload(response) for response in whole]
    assert {response.status for response in whole} == {"done"}
    assert [response.fingerprint for response in whole] == server.fingerprints[:3]


def test_the_same_order_twice_has_the_same_answer_and_the_new_ticket(server: Server, tmp_path: Path) -> None:
    site = trainer(tmp_path)
    first, second = ask(site, server.request(1)), ask(site, server.request(1, ticket="another"))
    fresh = ask(trainer(tmp_path), server.request(1))
    assert first.reply == second.reply and payload(fresh) == payload(first)
    assert (first.ticket, second.ticket) == ("t", "another")


def test_a_restarted_trainer_rebuilds_from_base_and_its_own_log(server: Server, tmp_path: Path) -> None:
    ask(trainer(tmp_path), server.request(3))
    again = ask(trainer(tmp_path), server.request(3, since=3, recipe=""))
    assert (again.status, again.version, again.fingerprint) == ("done", 3, server.fingerprints[3])


def test_a_site_says_what_it_lacks_and_is_content_with_that(server: Server, tmp_path: Path) -> None:
    site = trainer(tmp_path)
    assert ask(site, server.request(2, recipe="")).reason == "recipe"
    missing = ask(site, server.request(2, since=2))
    assert (missing.status, missing.reason, missing.version) == ("missing", "records", 0)
    assert ask(site, server.request(2)).status == "done"
    missed = ask(site, server.request(4, since=3, recipe=""))
    assert (missed.status, missed.reason, missed.version) == ("missing", "records", 2)
    assert ask(site, server.request(4, since=1, recipe="")).status == "done"  # records it has already do no harm


def test_a_private_state_that_another_copy_of_the_run_left_is_begun_again_and_that_is_said(
    server: Server, tmp_path: Path
) -> None:
    """Copies of the server's folder that are rewound in turn may each have run a round of that number."""
    first = payload(ask(trainer(tmp_path), server.request(0, epoch=7)))
    assert payload(ask(trainer(tmp_path / "plain"), server.request(0))) == first
    goes_on = payload(ask(trainer(tmp_path / "plain"), server.request(1)))
    for known in (7, -1):  # -1: the server does not know
        copy = Path(shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}{known}")))
        done = ask(trainer(copy), server.request(1, epoch=9, counted_epoch=known))
        assert payload(done) == goes_on and not done.reason
    anew = ask(trainer(tmp_path), server.request(1, epoch=9, counted_epoch=0))
    assert payload(anew) == payload(ask(trainer(tmp_path / "new"), server.request(1, counted=0)))
    assert anew.reason == "the private state of round 1 is damaged, or of another copy of the run: it is begun again"


def test_the_epoch_of_a_counted_round_follows_from_the_rewindings() -> None:
    state = RunState(None, None, Unfolded(), versions={name: round - 1 for round, name in enumerate("abcdef", 1)})  # type: ignore[arg-type]  # no node is needed
    assert state.counted("c") == (3, -1) and state.counted("stranger") == (0, -1)
    for rewinds, epochs in (
        ([], [0, 0, 0, 0, 0, 0]),
        ([(4, 10)], [0, 0, 0, 0, 10, 10]),
        ([(4, 10), (5, 20)], [0, 0, 0, 0, 10, 20]),
        ([(4, 10), (5, 20), (2, 30)], [0, 0, 30, 30, 30, 30]),
        ([(4, 10), (2, 20), (4, 30)], [0, 0, 20, 20, 30, 30]),
        ([(4, 10), (4, 11)], [0, 0, 0, 0, 11, 11]),
    ):
        state.rewinds = rewinds
        assert [state.counted(name) for name in "abcdef"] == list(enumerate(epochs, 1))
    assert state.counted("stranger") == (0, 0)


def test_a_private_state_is_the_one_of_the_round_that_was_counted(server: Server, tmp_path: Path) -> None:
    site = trainer(tmp_path)
    ask(site, server.request(0))
    kept = payload(ask(site, server.request(1, counted=1)))
    assert payload(ask(trainer(tmp_path), server.request(1, counted=1))) == kept  # whatever it has done since
    assert payload(ask(site, server.request(1, counted=0))) != kept
    assert len(list(tmp_path.rglob("*.state"))) == 1


def test_a_site_keeps_its_private_state_to_itself(server: Server, tmp_path: Path) -> None:
    assert ask(trainer(tmp_path), server.request(0)).private == b""
    simulated = ask(trainer(None), server.request(0))
    assert simulated.private and not list(tmp_path.glob("runs/*/nothing"))


@pytest.mark.parametrize("kind", ["flipped", "cut", "another record", "emptied", "a folder"])
def test_a_damaged_record_is_named_and_asked_for_again(kind: str, server: Server, tmp_path: Path) -> None:
    events: list[Any] = []
    ask(trainer(tmp_path), server.request(3))
    record = tmp_path / "runs" / RUN[:16] / "log" / "000002.record"
    content = record.read_bytes()
    damaged = {
        "flipped": content[:20] + bytes([content[20] ^ 1]) + content[21:],
        "cut": content[:-9],
        "another record": record.with_name("000003.record").read_bytes(),
        "emptied": b"",
    }
    record.unlink()
    if kind in damaged:
        record.write_bytes(damaged[kind])
    else:
        record.mkdir()
    for name in ("notes.record", "000001.snapshot.old"):  # strays
        record.with_name(name).write_bytes(b"mine")
    site = trainer(tmp_path, on_message=events.append)
    missing = ask(site, server.request(3, since=3, recipe=""))
    assert (missing.reason, missing.version) == ("records", 1)
    assert "000002.record is damaged" in events[-1]["note"]
    assert ask(site, server.request(3, since=1, recipe="")).fingerprint == server.fingerprints[3]
    assert ask(trainer(tmp_path), server.request(3, since=3, recipe="")).status == "done"


@pytest.mark.parametrize("kind", ["spoilt", "another site's", "another round's", "a folder", "gone"])
def test_a_damaged_private_state_is_named_and_begun_again(kind: str, server: Server, tmp_path: Path) -> None:
    events: list[Any] = []
    ask(trainer(tmp_path), server.request(0))
    (state,) = tmp_path.rglob("*.state")
    content = state.read_bytes()
    state.unlink()
    if kind == "a folder":
        state.mkdir()
    elif kind == "another site's":
        ask(toy_trainer(METHOD, ROUNDS, {"b": DATA["b"]}, tmp_path / "b", "b"), server.request(0, client="b"))
        state.write_bytes(next((tmp_path / "b").rglob("*.state")).read_bytes())
    elif kind != "gone":
        state.write_bytes(content if kind == "another round's" else b"spoilt")
    if kind == "another round's":
        state.rename(state.with_name("000002.state"))
    counted = 2 if kind == "another round's" else 1
    anew = ask(trainer(tmp_path, on_message=events.append), server.request(1, counted=counted))
    assert anew.status == "done" and "is begun again" in events[-1]["note"]
    assert ("000001.state is damaged" in events[-1]["note"]) == (kind in ("spoilt", "another site's", "a folder"))
    assert payload(anew) == payload(ask(trainer(tmp_path / "new"), server.request(1, counted=0)))


def test_a_damaged_recipe_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    ask(trainer(tmp_path), server.request(1))
    recipe = tmp_path / "runs" / RUN[:16] / "recipe.toml"
    for damaged in (b"rounds = 1\n", RECIPE.encode()[:-3], b"\xff"):
        events: list[Any] = []
        recipe.write_bytes(damaged)
        site = trainer(tmp_path, on_message=events.append)
        assert ask(site, server.request(1, since=1, recipe="")).reason == "recipe"
        assert "recipe.toml is damaged" in events[-1]["note"] and not recipe.exists()
        assert ask(site, server.request(1, since=1)).status == "done" and recipe.read_text() == RECIPE


def test_another_base_is_named(server: Server, tmp_path: Path) -> None:
    response = ask(trainer(tmp_path, base="f" * 64), server.request(0))
    assert response.status == "refused"
    assert f"the base model here has SHA-256 ffffffffffff…, and the run began from {BASE[:12]}…" in response.reason


def test_a_replica_with_another_hash_says_so_and_is_rebuilt_on_demand(server: Server, tmp_path: Path) -> None:
    site = trainer(tmp_path)
    differing = ask(site, server.request(2, fingerprint="f" * 64))
    assert (differing.status, differing.reason) == ("missing", "replica")
    rebuilt = ask(site, server.request(2, rebuild=True))
    assert (rebuilt.status, rebuilt.fingerprint) == ("done", server.fingerprints[2])


def test_an_order_that_is_over_leaves_the_replica_alone(server: Server, tmp_path: Path) -> None:
    site = trainer(tmp_path)
    ask(site, server.request(3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("runs/**/*") if path.is_file()}
    late = ask(site, server.request(1))
    assert (late.status, late.version) == ("missing", 3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("runs/**/*") if path.is_file()} == before
    assert ask(site, server.request(3, since=3)).status == "done"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "message of 0 bytes"),
        (b"garbage that is no message", "not a fedferret message"),
        (codec.encode(7), "a int came where a Request was expected"),
    ],
)
def test_what_is_no_request_is_refused_in_words(message: bytes, reason: str, tmp_path: Path) -> None:
    response = ask(trainer(tmp_path), message)
    assert response.status == "refused" and reason in response.reason
    assert not list(tmp_path.rglob("*.record"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": "../../etc"}, "names no run"),
        ({"round": -1}, "names no run, round or version"),
        ({"version": -1}, "names no run, round or version"),
        ({"records": "many"}, "Request.records holds a value of type str"),
        ({"records": (b"garbage, no record",), "version": 1}, "not a fedferret message"),
        ({"records": (7,), "version": 1}, "Request.records holds a tuple of 1, and tuple[bytes, ...] is declared"),
        ({"recipe": "rounds = 1\n"}, "the recipe that came is not the one that the request names"),
        ({"client": "b"}, "this site works for a, and the request is for b"),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_words(
    changes: Mapping[str, Any], reason: str, server: Server, tmp_path: Path
) -> None:
    site = trainer(tmp_path)
    request = codec.decode(server.request(0))
    response = ask(site, codec.encode(replace(request, **changes)))
    assert response.status == "refused" and reason in response.reason
    assert ask(site, server.request(1)).status == "done"


def test_the_model_is_built_once_a_run(server: Server, tmp_path: Path) -> None:
    built: list[str] = []
    site = trainer(tmp_path, built=built)
    for version in range(4):
        ask(site, server.request(version))
    assert built == [RECIPE]


@pytest.mark.parametrize("name", ["fedavg", "ferret"])
def test_a_log_that_folds_leaves_one_snapshot_and_what_follows_it(name: str, tmp_path: Path) -> None:
    run: Simulation = simulate_sites(METHODS[name], 4, sites(METHODS[name], 4, tmp_path))
    log = tmp_path / "a" / "runs" / RUN[:16] / "log"
    held = Log.read(log, 3).since(0)
    assert isinstance(held, LogUpdate)
    assert len(list(log.glob("*.snapshot"))) == (name == "fedavg")
    assert run.public == simulate(METHODS[name], 4).public
    assert len(list(log.iterdir())) <= (1 if name == "fedavg" else 3)


def test_the_audit_says_what_came_and_went_and_outlives_a_torn_line(server: Server, tmp_path: Path) -> None:
    site = trainer(tmp_path, on_message=Audit(tmp_path))
    message = server.request(1)
    size = len(site.handle(message))
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"what": "ord')
    site.handle(b"garbage, no message")
    request, answer, refused = read_audit(tmp_path)
    assert (request["what"], request["framed_bytes"], request["round"]) == ("request", len(message), 2)
    assert (answer["what"], answer["framed_bytes"], answer["version"]) == ("done", size, 1)
    assert 0 < answer["payload_bytes"] < size and answer["data"] == "fingerprint of the data"
    assert refused["what"] == "refused" and "not a fedferret message" in refused["note"]
    assert {request["privacy"], answer["privacy"]} == {"none"}


def test_what_cannot_be_written_down_is_not_sent(server: Server, tmp_path: Path) -> None:
    def full(event: Mapping[str, Any]) -> None:
        if event["what"] == "done":
            raise OSError(28, "No space left on device")

    response = ask(trainer(tmp_path, on_message=full), server.request(0))
    assert (response.status, response.reply) == ("refused", b"")
    assert "cannot write its audit file: [Errno 28] No space left" in response.reason
