"""The server's half: the same bits as in-process, and whatever a site sends or does is one line and no more."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contract.methods import METHODS, reference, rounds_of
from fedferret.core.exchanges import ClientUpdate
from fedferret.engines.transport import Received, Response
from fedferret.wire import codec
from toy_sites import Direct, simulate_sites, sites, toy_trainer, workers
from toys import Simulation, toy_clients


@pytest.mark.parametrize("name", ["fedavg", "ferret-error-feedback", "hermits"])
def test_workers_have_the_bits_of_one_process_private_states_too(name: str) -> None:
    rounds = rounds_of(METHODS[name])
    run = simulate_sites(METHODS[name], rounds, workers(METHODS[name], rounds))
    assert run.memory == reference(name).memory


Change = Callable[[Response], Any]


def changed(**fields: Any) -> Change:
    return lambda response: codec.encode(replace(response, **fields))


def updated(change: Callable[[ClientUpdate], Any]) -> Change:
    return lambda response: codec.encode(replace(response, reply=codec.encode(change(codec.decode(response.reply)))))


def with_guest(tmp_path: Path, change: Change, **options: Any) -> tuple[Simulation, list[str]]:
    """The reference run with one more site, "ab", which sends something else than it meant."""
    said: list[str] = []

    def misbehaving(data: Any) -> Direct:
        transport = sites(METHODS["ferret"], 4, tmp_path)(data)

        def tamper(site: str, message: bytes, content: bytes) -> list[Any]:
            if site != "ab":
                return [content]
            sent = change(codec.decode(content))
            return sent if isinstance(sent, list) else [sent]

        transport.tamper = tamper
        return transport

    data = toy_clients()
    data |= {"ab": data["a"]}
    return simulate_sites(METHODS["ferret"], 4, misbehaving, data=data, log=said.append, **options), said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: b"", "message of 0 bytes: truncated"),
        (lambda r: b"garbage that is no message", "not a fedferret message"),
        (lambda r: codec.encode(r)[:-9], "checksum differs"),
        (lambda r: codec.encode(7), "a int came where a Response was expected"),
        (lambda r: codec.encode(r.reply), "a bytes came where a Response was expected"),
        (changed(reply=None), "Response.reply holds None, and bytes is declared"),
        (changed(version="newest"), "Response.version holds a value of type str, and int is declared"),
        (changed(status="perhaps"), "sent the invalid status 'perhaps'"),
        (
            changed(status="missing", reason="\x1b]8;;http://x\x07"),
            "says that .{1,3}8;;http://x.. is missing, and no such",
        ),
        (changed(round=1, ticket="old"), "replied to a request of round 1 that is over"),
        (changed(client="a"), "replied for a in round"),
        (changed(round=99), "in round 99, which it was not asked"),
        (changed(run="0" * 64), "which it was not asked"),
        (changed(reply=b""), "message of 0 bytes"),
        (changed(reply=b"x" * 100), "not a fedferret message"),
        (changed(reply=b"x" * (1 << 17)), "no response of this run has more than"),
        (changed(status="refused", reason="no\nlight\x1b[31m"), "^no light�.31m$"),
        (changed(status="refused", reason="ha" * 9999), "^(ha){150}$"),
        (lambda r: Received("ab", None, "connection lost"), "^connection lost$"),
        (lambda r: [], "^no reply before the deadline$"),
        (updated(lambda e: e.payload), "where a ClientUpdate was expected"),
        (
            updated(lambda e: replace(e, num_examples=float("nan"))),
            "ClientUpdate.num_examples holds a value of type float",
        ),
        (updated(lambda e: replace(e, payload=replace(e.payload, norms=e.payload.norms[1:]))), "4 bytes were expected"),
        (
            updated(
                lambda e: replace(
                    e, payload=replace(e.payload, coordinates=replace(e.payload.coordinates, scale=float("nan")))
                )
            ),
            "is not one of 60 values",
        ),
    ],
)
def test_whatever_a_site_sends_is_one_failure_and_the_others_run_goes_on(
    change: Change, reason: str, tmp_path: Path
) -> None:
    run, _ = with_guest(tmp_path, change)
    assert run.public == reference("ferret").public
    for record in run.records:
        (failure,) = record.failures
        assert failure.client == "ab" and re.search(reason, failure.reason), failure
        assert "\n" not in failure.reason and len(failure.reason) < 400
        assert "ab" not in record.bytes_up


def test_a_second_answer_counts_for_nothing_and_is_said(tmp_path: Path) -> None:
    once, _ = with_guest(tmp_path / "once", codec.encode)
    twice, said = with_guest(tmp_path / "twice", lambda response: [codec.encode(response)] * 2)
    assert twice.public == once.public and twice.history() == once.history()
    assert said == [f"ab: a second response in round {number}; ignored" for number in range(1, 5)]


def test_a_good_copy_after_a_late_or_damaged_one_counts(tmp_path: Path) -> None:
    once, _ = with_guest(tmp_path / "once", codec.encode)
    for number, bad in enumerate((b"garbage", None)):
        late, _ = with_guest(
            tmp_path / str(number),
            lambda response, bad=bad: [bad or codec.encode(replace(response, ticket="old")), codec.encode(response)],
        )
        assert late.public == once.public and late.history() == once.history()


def test_an_answer_of_a_site_that_was_not_asked_is_ignored_and_said(tmp_path: Path) -> None:
    once, _ = with_guest(tmp_path / "once", codec.encode)
    run, said = with_guest(
        tmp_path / "run", lambda response: [Received("stranger", codec.encode(response)), codec.encode(response)]
    )
    assert run.public == once.public
    assert said == ["stranger: a message came from a site that was asked nothing; ignored"] * 4


def test_a_site_whose_replica_differs_is_named_rebuilds_once_and_counts(tmp_path: Path) -> None:
    once, _ = with_guest(tmp_path / "once", codec.encode)
    spoilt: list[int] = []

    def spoil(response: Response) -> Any:
        if response.round == 3 and not spoilt:
            spoilt.append(1)
            return codec.encode(replace(response, fingerprint="f" * 64))
        return codec.encode(response)

    run, said = with_guest(tmp_path / "run", spoil)
    assert run.public == once.public and run.history() == once.history()
    assert said == ["ab: its replica differs from the server's; it rebuilds from base and log"]


def test_a_site_that_still_differs_after_rebuilding_is_a_failure_that_says_so(tmp_path: Path) -> None:
    run, said = with_guest(tmp_path, changed(fingerprint="f" * 64))
    assert run.public == reference("ferret").public
    assert {record.failures[0].stage for record in run.records} == {"replica"}
    assert "rebuilt from base and log it still differs at version 0" in run.records[0].failures[0].reason
    assert len(said) == 4


def test_a_site_that_always_lacks_something_is_given_up_in_its_round(tmp_path: Path) -> None:
    run, _ = with_guest(tmp_path, changed(status="missing", reason="records"))
    assert run.public == reference("ferret").public
    assert run.records[0].failures[0].reason == "its records is still missing after it was sent"


def test_a_site_that_lost_its_folder_is_sent_everything_and_counts(tmp_path: Path) -> None:
    transports: list[Direct] = []

    def losing(data: Any) -> Direct:
        transport = sites(METHODS["ferret"], 4, tmp_path / "old")(data)

        def lose(site: str, message: bytes, content: bytes) -> list[bytes]:
            if site == "b" and codec.decode(content).round == 2 and codec.decode(content).status == "done":
                transport.trainers["b"] = toy_trainer(METHODS["ferret"], 4, {"b": data["b"]}, tmp_path / "new", "b")
            return [content]

        transport.tamper = lose
        transports.append(transport)
        return transport

    run = simulate_sites(METHODS["ferret"], 4, losing)
    assert run.public == reference("ferret").public
    assert [sorted(sent) for sent in transports[0].exchanges] == [
        ["a", "b", "c"],
        ["a", "b", "c"],
        ["a", "b", "c"],
        ["b"],  # the recipe, and with it all records
        ["a", "b", "c"],
    ]


def test_nothing_of_a_response_is_logged_before_it_is_known_to_be_one(tmp_path: Path) -> None:
    """A status is the kind of the line in the server's records, which `fedferret nodes` reads."""
    events: list[Any] = []
    with_guest(tmp_path, changed(status="traffic", reason="x" * 10_000), on_message=events.append)
    with_guest(tmp_path / "again", changed(process=1 << 50), on_message=events.append)
    assert {event["what"] for event in events} == {"request", "done"}
    assert all(event["what"] == "request" for event in events if event["client"] == "ab")


def test_an_order_costs_the_log_and_a_few_hundred_bytes(tmp_path: Path) -> None:
    events: list[Any] = []
    simulate_sites(METHODS["ferret"], 4, sites(METHODS["ferret"], 4, tmp_path), on_message=events.append)
    requests = [event for event in events if event["what"] == "request"]
    answers = [event for event in events if event["what"] == "done"]
    assert len(requests) == len(answers) == 12
    assert all(0 < event["framed_bytes"] - event["payload_bytes"] < 600 for event in requests + answers)
    assert {event["version"] for event in answers} == {0, 1, 2, 3}


def test_a_run_resumed_at_the_server_asks_sites_only_for_what_is_missing(tmp_path: Path) -> None:
    name = "ferret-error-feedback"
    first = simulate_sites(METHODS[name], 4, sites(METHODS[name], 4, tmp_path), folder=tmp_path / "server", until=2)
    assert first.state.round == 2
    again = simulate_sites(METHODS[name], 4, sites(METHODS[name], 4, tmp_path), folder=tmp_path / "server")
    assert again.public == reference(name).public


MEMORY = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from fedferret.algorithms.fedavg import Delta, FedAvg
from fedferret.core.exchanges import ClientUpdate
from fedferret.core.log import Log
from fedferret.core.node import Node
from fedferret.core.rounds import Plan, RunState, run
from fedferret.core.task import Task
from fedferret.engines.remote import Remote
from fedferret.engines.transport import Received, Response
from fedferret.wire import codec
from toy_sites import BASE, RECIPE
from toys import TRAINING, SquaredError

model = torch.nn.Linear(1 << 11, 1 << 10)  # 8 MB of weights
delta = Delta({{name: torch.full_like(weight, 1e-3).detach() for name, weight in model.named_parameters()}})

class Sites:
    def exchange(self, messages, deadline):
        for name in reversed(list(messages)):  # the first of the cohort comes last: all others wait for it
            request = codec.decode(messages[name])
            reply = codec.encode(ClientUpdate(delta, 1, {{}}))
            head = request.run, 0, request.round, request.ticket, name
            state = "done", request.version, request.fingerprint, 1
            response = Response(*head, *state, reply, "", b"", request.sequence)
            yield Received(name, codec.encode(response))
    def close(self): pass

names = [f"site-{{number}}" for number in range({count})]
node, server = Node.start(Task.of(model, SquaredError(), 2), FedAvg(training=TRAINING), 1, codec)
engine = Remote(Sites(), codec, recipe=RECIPE, base=BASE, deadline=60.0)
for record in run(engine, names, RunState(node, server, Log()), Plan(1, 2, {count})):
    assert len(record.metrics) == {count}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow(seconds=30)
def test_the_servers_memory_does_not_grow_with_the_number_of_replies() -> None:
    tests = str(Path(__file__).parents[1])

    def peak(count: int) -> int:
        program = MEMORY.format(tests=tests, count=count)
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr
        return int(ran.stdout)

    few, many = peak(4), peak(24)
    print(f"peak with 4 replies of 8 MB: {few / 1e6:.0f} MB, with 24: {many / 1e6:.0f} MB")
    assert many - few < 3 * 8.4e6  # 20 replies more are 168 MB
