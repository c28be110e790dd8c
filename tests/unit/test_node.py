"""The node: the only way to a public state, for whoever owns one; and scoring changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from contract.methods import METHODS, reference
from contract.staged_methods import TwoStages
from contract.unlike_methods import Hermit, Hermits
from fedferret.algorithms.fedavg import FedAvg
from fedferret.core import rounds
from fedferret.core.algorithm import AnyAlgorithm, ClientReply
from fedferret.core.errors import RunError
from fedferret.core.exchanges import ClientScores, Failure, Score, Train
from fedferret.core.keys import Key
from fedferret.core.log import Log, LogUpdate
from fedferret.core.node import Diverged, MissingRecords, Node
from fedferret.core.task import Examples, Task
from fedferret.engines.in_process import InProcess
from fedferret.engines.remote import Remote
from fedferret.wire import codec
from fedferret.wire.ledger import Ledger
from toy_sites import BASE, RECIPE, Direct, toy_trainer
from toys import TRAINING, SquaredError, bits, simulate, toy_clients, toy_rows, toy_task

METHOD = METHODS["ferret"]


class Unfolded(Log):
    """A log with snapshots that are never due: a toy model is smaller than a few entries."""

    def append(self, record: bytes, snapshot_size: int, snapshot: Any) -> None:
        """As if the model were large."""
        super().append(record, 1 << 60, snapshot)


def fresh(name: str = "ferret") -> Node:
    return Node.start(toy_task(4, METHODS[name]), METHODS[name], 3, codec)[0]


def log_and_versions() -> tuple[Log, list[bytes]]:
    """The log of four rounds, and the public state at each version."""
    node, server = Node.start(toy_task(4, METHOD), METHOD, 3, codec)
    state = rounds.RunState(node, server, Unfolded())
    versions = [bits(node.public)]
    data = toy_clients()
    for _ in rounds.run(InProcess(data, codec), list(data), state, rounds.Plan(3, 4, 3, fingerprint_every=1)):
        versions.append(bits(node.public))
    return state.log, versions


def test_a_node_goes_to_any_version_from_any_earlier_one_and_passes_over_what_it_has() -> None:
    log, versions = log_and_versions()
    for first in range(5):
        node = fresh()
        records = log.since(0).records
        node.catch_up(LogUpdate(first, None, records[:first]))
        assert bits(node.public) == versions[first] and node.version == first
        node.catch_up(log.since(max(0, first - 2)))  # records that it has do no harm
        assert bits(node.public) == versions[4] and node.version == 4
        node.catch_up(LogUpdate(2, None, records[:2]))  # an older update changes nothing
        assert bits(node.public) == versions[4]


def test_an_update_with_a_gap_is_refused_and_the_node_stays_of_use() -> None:
    log, versions = log_and_versions()
    node = fresh()
    with pytest.raises(MissingRecords, match="an update from version 2 cannot follow version 0"):
        node.catch_up(LogUpdate(4, None, log.since(2).records))
    assert bits(node.public) == versions[0] and not node.void
    node.catch_up(log.since(0))
    assert bits(node.public) == versions[4]


def test_a_node_that_diverges_or_breaks_off_is_void() -> None:
    log, _ = log_and_versions()
    records = list(log.since(0).records)
    wrong = codec.encode(replace(codec.decode(records[1]), fingerprint="f" * 64))
    for broken, error in ((wrong, Diverged), (records[2], ValueError), (codec.encode(7), ValueError)):
        node = fresh()
        with pytest.raises(error):
            node.catch_up(LogUpdate(4, None, (records[0], broken, *records[2:])))
        with pytest.raises(RunError, match="broke off half-way"):
            node.catch_up(log.since(0))


def test_a_body_that_no_guard_declares_is_refused() -> None:
    with pytest.raises(ValueError, match="a LogUpdate is no part of this run's rounds"):
        fresh().handle(LogUpdate(1, None, ()), "a", None, toy_clients()["a"])


def test_a_private_state_that_was_read_from_a_file_lies_on_the_device_that_computes() -> None:
    """A decoded state lies in the processor's memory; the meta device stands for a GPU."""
    seen: list[torch.device] = []

    class Watching(FedAvg):
        def client_update(self, task: Any, public: Any, client: Any, data: Any, key: Key) -> Any:
            seen.extend(tensor.device for tensor in client.residual.values())
            return ClientReply(None, client)  # type: ignore[type-var]

    private = reference("ferret-error-feedback").store.get("a")
    assert {tensor.device.type for tensor in private.residual.values()} == {"cpu"}
    node = Node(Task.of(nn.Linear(2, 2, device="meta"), SquaredError(), 1), Watching(training=TRAINING), 3, codec, None)
    node.handle(Train(1), "a", private, toy_clients()["a"])
    assert seen and {device.type for device in seen} == {"meta"}


HELD_OUT = {name: toy_rows(Key.of(8, name), 5 + 3 * place) for place, name in enumerate("abc")}


def at_toy_sites(
    algorithm: AnyAlgorithm, data: Mapping[str, Examples], folder: Path, messages: list[Mapping[str, Any]] | None = None
) -> Remote:
    """An engine over sites that hold examples out; it lists its messages."""
    trainers = {
        site: toy_trainer(algorithm, 4, {site: rows}, folder / site, site, held_out=HELD_OUT)
        for site, rows in data.items()
    }
    heard = [] if messages is None else messages
    return Remote(Direct(trainers), codec, recipe=RECIPE, base=BASE, deadline=60.0, on_message=heard.append)


def scored(name: str, tmp_path: Path | None) -> tuple[bytes, list[dict[str, dict[str, float]]]]:
    """A run that scores at its clients after every round: what it tuned, and the sums."""
    algorithm, data, found = METHODS[name], toy_clients(), []
    node, server = Node.start(toy_task(4, algorithm), algorithm, 3, codec)
    state = rounds.RunState(node, server, Log())
    engine: Any
    engine = InProcess(data, codec, held_out=HELD_OUT) if tmp_path is None else at_toy_sites(algorithm, data, tmp_path)
    for _ in rounds.run(engine, list(data), state, rounds.Plan(3, 4, 3, fingerprint_every=1)):
        sums, failures, moved = rounds.score(engine, list(data), state, 4)
        assert not failures and set(moved) == set(data) and min(moved.values()) > 0
        found.append(sums)
    return bits(state.public), found


@pytest.mark.parametrize("name", ["fedavg", "ferret-error-feedback", "hermits", "two-stages"])
def test_a_round_with_score_equals_one_without_in_every_engine(name: str, tmp_path: Path) -> None:
    here, sums = scored(name, None)
    assert here == reference(name).public
    there, sums_at_sites = scored(name, tmp_path)
    assert there == here and sums_at_sites == sums
    assert {client: each["count"] for client, each in sums[-1].items()} == {"a": 5.0, "b": 8.0, "c": 11.0}


@pytest.mark.parametrize(("name", "cohort"), [("ferret", 3), ("ferret", 2), ("fedavg", 2)])
def test_what_a_site_was_sent_to_score_it_is_not_sent_again_and_every_byte_is_booked_once(
    name: str, cohort: int, tmp_path: Path
) -> None:
    method, data, downs = METHODS[name], toy_clients(), []
    for scores in (True, False):
        node, server = Node.start(toy_task(4, method), method, 3, codec)
        state = rounds.RunState(node, server, Unfolded() if name == "ferret" else Log())
        messages: list[Mapping[str, Any]] = []
        engine, ledger, up = at_toy_sites(method, data, tmp_path / str(scores), messages), Ledger(1), 0
        for record in rounds.run(engine, list(data), state, rounds.Plan(3, 4, cohort, fingerprint_every=1)):
            ledger.add(record.round, record.bytes_up, record.bytes_down, record.brought)
            for _ in range(2 if scores else 0):  # who asks twice sends the log once
                sums, failures, moved = rounds.score(engine, list(data), state, 4)
                assert not failures and len(sums) == len(data)
                ledger.scores.setdefault(record.round, dict.fromkeys(data, 0))
                for client in data:
                    ledger.scores[record.round][client] += moved[client]
                up += sum(codec.size(ClientScores(each)) for each in sums.values())
        assert ledger.up + ledger.down + ledger.evaluation == sum(each["payload_bytes"] for each in messages)
        assert Ledger.from_dict(ledger.to_dict()) == ledger
        if scores and cohort == len(data):  # no training needed the last entry
            assert ledger.evaluation == up + len(data) * state.log.since(3).size
        downs.append(ledger.down_by_round)
    assert downs[0] == downs[1]


def test_the_sums_of_clients_are_the_sums_over_all_their_data() -> None:
    """Any split of the data gives the same figure."""
    _, sums = scored("fedavg", None)
    run = reference("fedavg")
    with run.algorithm.model(run.task, run.state.public) as model, torch.no_grad():
        assert model is not None
        x = torch.cat([rows.x for rows in HELD_OUT.values()])
        y = torch.cat([rows.y for rows in HELD_OUT.values()])
        whole = float(((model(x) - y) ** 2).sum())
    assert sum(each["loss"] for each in sums[-1].values()) == pytest.approx(whole, rel=1e-6)


def test_a_client_that_holds_nothing_out_is_a_failure_of_one_line() -> None:
    run = simulate(METHODS["fedavg"], 2)
    engine = InProcess(run.data, codec, held_out={"a": HELD_OUT["a"], "b": HELD_OUT["b"].take([])})
    sums, failures, _ = rounds.score(engine, ["a", "b", "c"], run.state, 4)
    assert list(sums) == ["a"] and [failure.client for failure in failures] == ["b", "c"]
    assert failures[0] == Failure("b", "local", "ValueError: the client holds no example out")


def test_a_personal_model_is_scored_before_its_client_has_trained_and_that_trains_nothing() -> None:
    run = reference("hermits")
    reply, private = run.state.node.handle(Score(4, 4), "newcomer", None, HELD_OUT["a"], lambda: toy_clients()["a"])
    assert isinstance(reply, ClientScores) and private is None and reply.sums["count"] == 5.0


@pytest.mark.parametrize("at_sites", [False, True])
def test_a_first_private_state_is_made_from_training_rows_for_scoring_too(at_sites: bool, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watching(Hermits):
        def init_client(self, task: Any, public: Any, data: Any, key: Key) -> Hermit:
            seen.append(len(data))
            return super().init_client(task, public, data, key)

    data = toy_clients()
    node, server = Node.start(toy_task(4, Watching()), Watching(), 3, codec)
    engine = at_toy_sites(Watching(), data, tmp_path) if at_sites else InProcess(data, codec, held_out=HELD_OUT)
    sums, _, _ = rounds.score(engine, list(data), rounds.RunState(node, server, Log()), 4)
    assert sorted(seen) == [len(rows) for rows in data.values()] == [9, 12, 15]
    assert [each["count"] for each in sums.values()] == [5.0, 8.0, 11.0]


def test_a_client_with_the_private_state_of_an_earlier_stage_alone_is_scored_with_a_first_one_of_this_stage() -> None:
    method = TwoStages(first=METHODS["ferret-error-feedback"], second=Hermits(), first_rounds=1)
    data = toy_clients()
    node, server = Node.start(toy_task(3, method), method, 3, codec)
    state, engine = rounds.RunState(node, server, Log()), InProcess(data, codec, held_out=HELD_OUT)
    next(rounds.run(engine, list(data), state, rounds.Plan(3, 3, 3)))
    sums, failures, _ = rounds.score(engine, list(data), state, 4)
    assert list(sums) == list(data) and not failures
