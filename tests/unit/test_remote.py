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
from fedferret.engines.envelope import Envelope
from fedferret.engines.transport import Received, Response
from fedferret.wire import codec
from toy_sites import Direct, simulate_sites, sites, toy_trainer, workers
from toys import Simulation, toy_clients

QUICK = ("fedavg", "ferret", "ferret-error-feedback", "fedavg-then-ferret")  # the rest waits for the slow tests
ROWS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("name", ROWS)
def test_every_method_over_sites_has_the_bits_of_one_process(name: str, tmp_path: Path) -> None:
    rounds = rounds_of(METHODS[name])
    run = simulate_sites(METHODS[name], rounds, sites(METHODS[name], rounds, tmp_path))
    assert run.public == reference(name).public
    assert [record.failures for record in run.records] == [()] * rounds
    assert [record.bytes_up for record in run.records] == [record.bytes_up for record in reference(name).records]


@pytest.mark.parametrize("name", ROWS)
def test_every_method_over_workers_has_the_bits_of_one_process_private_states_too(name: str) -> None:
    rounds = rounds_of(METHODS[name])
    run = simulate_sites(METHODS[name], rounds, workers(METHODS[name], rounds))
    assert run.memory == reference(name).memory


Change = Callable[[Response], Any]


def changed(**fields: Any) -> Change:
    return lambda response: codec.encode(replace(response, **fields))


def enveloped(change: Callable[[Envelope], Any]) -> Change:
    return lambda response: codec.encode(
        replace(response, content=codec.encode(change(codec.decode(response.content))))
    )


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
        (lambda r: codec.encode(7), "a int came where a Receipt was expected"),
        (lambda r: codec.encode(r.content), "a bytes came where a Receipt was expected"),
        (changed(content=None), "content of a received Response is no bytes"),
        (changed(version="newest"), "version of a received Response is no int"),
        (changed(outcome="perhaps"), "'perhaps', which means nothing"),
        (changed(round=1, ticket="old"), "answered an order of round 1 that is over"),
        (changed(client="a"), "answered for a in round"),
        (changed(round=99), "in round 99, which it was not asked"),
        (changed(run="0" * 64), "which it was not asked"),
        (changed(content=b""), "message of 0 bytes"),
        (changed(content=b"x" * 100), "not a fedferret message"),
        (changed(content=b"x" * (2 << 20)), "no answer of this run has more than"),
        (changed(outcome="refused", reason="no\nlight\x1b[31m"), "^no light�.31m$"),
        (changed(outcome="refused", reason="ha" * 9999), "^(ha){150}$"),
        (lambda r: Received("ab", None, "connection lost"), "^connection lost$"),
        (lambda r: [], "^no answer before the deadline$"),
        (enveloped(lambda e: e.payload), "where an Envelope was expected"),
        (
            enveloped(lambda e: replace(e, weight=1e12)),
            "claims 1,000,000,000,000 examples, more than the 10,000 allowed",
        ),
        (enveloped(lambda e: replace(e, weight=float("nan"))), "weight nan"),
        (enveloped(lambda e: replace(e, payload=replace(e.payload, norms=e.payload.norms[1:]))), "3 block norms came"),
        (
            enveloped(
                lambda e: replace(
                    e, payload=replace(e.payload, coordinates=replace(e.payload.coordinates, scale=float("nan")))
                )
            ),
            "NaN or infinity",
        ),
    ],
)
def test_whatever_a_site_sends_is_one_failure_and_the_others_run_goes_on(
    change: Change, reason: str, tmp_path: Path
) -> None:
    run, _ = with_guest(tmp_path, change, max_weight=10_000.0)
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
    assert said == [f"ab: a second answer in round {number}; ignored" for number in range(1, 5)]


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
    assert said == ["stranger: a letter came from a site that was asked nothing; ignored"] * 4


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
    run, _ = with_guest(tmp_path, changed(outcome="missing", reason="records"))
    assert run.public == reference("ferret").public
    assert run.records[0].failures[0].reason == "still lacks its records after it was sent"


def test_a_site_that_lost_its_folder_is_sent_everything_and_counts(tmp_path: Path) -> None:
    transports: list[Direct] = []

    def losing(data: Any) -> Direct:
        transport = sites(METHODS["ferret"], 4, tmp_path / "old")(data)

        def lose(site: str, message: bytes, content: bytes) -> list[bytes]:
            if site == "b" and codec.decode(content).round == 2 and codec.decode(content).outcome == "ok":
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


def test_an_order_costs_the_log_and_a_few_hundred_bytes(tmp_path: Path) -> None:
    events: list[Any] = []
    simulate_sites(METHODS["ferret"], 4, sites(METHODS["ferret"], 4, tmp_path), record=events.append)
    requests = [event for event in events if event["what"] == "request"]
    answers = [event for event in events if event["what"] == "ok"]
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
from fedferret.algorithms.fedavg import FedAvg
from fedferret.core.algorithm import Task
from fedferret.core.rounds import Plan, initial_state, run
from fedferret.core.log import Log
from fedferret.engines.envelope import Envelope
from fedferret.engines.remote import Remote
from fedferret.engines.transport import Received, Response
from fedferret.algorithms.fedavg import Delta
from fedferret.wire import codec
from toy_sites import BASE, RECIPE
from toys import TRAINING, squared_error

model = torch.nn.Linear(1 << 11, 1 << 10)  # 8 MB of weights
delta = Delta({{name: torch.full_like(weight, 1e-3).detach() for name, weight in model.named_parameters()}})

class Sites:
    def exchange(self, messages, deadline):
        for name in reversed(list(messages)):  # the first of the cohort comes last: all others wait for it
            request = codec.decode(messages[name])
            content = codec.encode(Envelope(delta, 1.0, {{}}))
            head = request.run, request.round, request.ticket, name
            response = Response(*head, "ok", request.version, request.fingerprint, 1,
                              content, "", b"")
            yield Received(name, codec.encode(response))
    def close(self): pass

names = [f"site-{{number}}" for number in range({count})]
method = FedAvg(training=TRAINING)
task = Task(model, squared_error, 2)
state = initial_state(task, method, 1, Log())
engine = Remote(Sites(), codec, recipe=RECIPE, base=BASE, deadline=60.0)
for record in run(task, method, engine, codec, names, state, Plan(1, 2, {count})):
    assert len(record.metrics) == {count}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
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
