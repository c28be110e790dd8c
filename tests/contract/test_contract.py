"""What every method promises, whatever it does; each test is named after its law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.methods import METHODS, reference, rounds_of
from fedferret.algorithms.registry import catalogue
from fedferret.core.algorithm import ClientReply, Pooled
from fedferret.core.errors import RunError
from fedferret.core.keys import Key
from fedferret.core.log import Log
from fedferret.core.pooling import Pool, tensors
from fedferret.core.rounds import Failure
from fedferret.engines.debug import Debug
from fedferret.local.zeroth_order import ZerothOrder
from fedferret.tracking.checkpoint import replay
from fedferret.wire import codec
from toys import (
    Backwards,
    Failing,
    Simulation,
    ToyData,
    bits,
    held_out_loss,
    shapes_of,
    simulate,
    toy_clients,
    toy_task,
)

FRAMING_PER_MESSAGE = 140  # bytes, as the methods' docstrings say; names and shapes of tensors come on top
FRAMING_PER_TENSOR = 12
FINGERPRINT = 66  # the toy's log has one in every record


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    """Every row in turn."""
    return str(request.param)


def test_every_registered_method_has_a_row() -> None:
    assert set(catalogue()) <= {method.name for method in METHODS.values()}


def test_same_key_same_bits_and_no_global_generator_moves(name: str) -> None:
    before = torch.get_rng_state()
    again = simulate(METHODS[name], rounds_of(METHODS[name]))
    assert torch.equal(torch.get_rng_state(), before)
    assert again.memory == reference(name).memory
    assert again.history() == reference(name).history()


def test_another_seed_gives_other_bits(name: str) -> None:
    if name == "prototypes":
        pytest.skip("draws nothing: means do not depend on the order of rows")
    assert simulate(METHODS[name], rounds_of(METHODS[name]), until=1, seed=4).memory != reference(name).memory


def test_local_and_update_change_none_of_their_inputs(name: str) -> None:
    run = played(name)
    client, data = "b", run.data["b"]
    private = run.engine.store.get(client) or run.algorithm.init_client(run.task, data, Key.of(1, "join"))
    before = bits((run.state.public, private, run.state.server))
    reply = run.algorithm.client_update(run.task, run.state.public, private, data, Key.of(1, "local"))
    assert bits((run.state.public, private, run.state.server)) == before
    pooled = pool(reply)
    pooled_before = bits((pooled.payloads, pooled.weights))
    _, entry = run.algorithm.server_update(run.task, run.state.public, run.state.server, pooled, Key.of(1, "update"))
    assert bits((run.state.public, private, run.state.server)) == before
    assert bits((pooled.payloads, pooled.weights)) == pooled_before
    entry_before = bits(entry)
    run.algorithm.apply(run.task, run.state.public, codec.decode(entry_before))
    entry = codec.decode(entry_before)
    run.algorithm.apply(run.task, run.state.public, entry)
    assert bits(entry) == entry_before


def test_looking_at_the_model_changes_nothing(name: str) -> None:
    run = played(name)
    before = run.memory
    first = run.loss()
    run.loss()
    assert run.memory == before
    assert run.loss() == first


@pytest.mark.parametrize("stop", [1, 2])
def test_stopped_saved_loaded_and_resumed_is_uninterrupted(name: str, stop: int, tmp_path: Path) -> None:
    rounds = rounds_of(METHODS[name])
    if stop >= rounds > 1:
        pytest.skip("nothing is left to play")
    first = simulate(METHODS[name], rounds, until=stop, folder=tmp_path)
    second = simulate(METHODS[name], rounds, folder=tmp_path)
    assert second.memory == reference(name).memory
    assert first.history() + second.history() == reference(name).history()


def test_every_engine_gives_the_same_bits(name: str) -> None:
    debug = simulate(METHODS[name], rounds_of(METHODS[name]), engine=Debug)
    assert debug.memory == reference(name).memory
    assert debug.history() == reference(name).history()


def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    backwards = simulate(METHODS[name], rounds_of(METHODS[name]), arriving=Backwards)
    assert backwards.memory == reference(name).memory
    assert backwards.history() == reference(name).history()


def test_every_message_and_state_survives_the_codec(name: str) -> None:
    run = played(name)
    reply = reply_of(run, "b")
    _, entry = run.algorithm.server_update(run.task, run.state.public, run.state.server, pool(reply), Key.of(1))
    for value in (reply.payload, entry, reply.client, run.state.public, run.state.server):
        encoded = codec.encode(value)
        decoded = codec.decode(encoded)
        assert type(decoded) is type(value)
        assert codec.encode(decoded) == encoded
        assert codec.size(value) == len(encoded)


def test_a_payload_shares_no_memory_with_any_state(name: str) -> None:
    run = played(name)
    private = run.engine.store.get("b")
    reply = reply_of(run, "b")
    sent = {tensor.untyped_storage().data_ptr() for _, tensor in tensors(reply.payload)}
    kept = [tensor for part in (run.state.public, private, reply.client) for _, tensor in tensors(part)]
    kept += [weight.detach() for weight in run.task.model.parameters()]
    assert not sent & {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel()}


def test_the_ledger_is_the_formula_and_bounded_framing(name: str) -> None:
    run, cohort, shapes = reference(name), len(toy_clients()), shapes_of(METHODS[name])
    cost, snapshot = METHODS[name].wire_cost(shapes, cohort), codec.size(run.state.public)
    whole = cost.up >= 4 * sum(map(math.prod, shapes.values()))  # tensor by tensor, each with its name
    framing = FRAMING_PER_MESSAGE + (sum(FRAMING_PER_TENSOR + len(name) for name in shapes) if whole else 0)
    answers = max(1, cost.down / cost.up)  # each with a frame, where the entry carries every client's
    bound = name in ("ferret-paper-code", "fedavg-then-ferret") or METHODS[name].name.startswith(
        ("fedkseed", "fedavg-top-k")
    )
    exact = not bound  # there, the formula is the most it can be
    for record in run.records:
        for up in record.bytes_up.values():
            assert (cost.up if exact else 0) <= up <= cost.up + framing
        for down in record.bytes_down.values():
            if record.round == 1:
                assert down == 0  # everybody has the base
            else:  # on this small model the log sometimes folds
                assert min(snapshot, cost.down if exact else 0) <= down
                assert down <= cost.down + framing * answers + FINGERPRINT


def test_what_a_client_keeps_is_the_formula_and_bounded_framing(name: str) -> None:
    shapes = shapes_of(METHODS[name])
    kept = METHODS[name].wire_cost(shapes, len(toy_clients())).client_state_bytes
    framing = FRAMING_PER_MESSAGE + sum(FRAMING_PER_TENSOR + len(name) for name in shapes)
    for client in toy_clients():
        assert kept <= codec.size(reference(name).engine.store.get(client)) <= kept + framing


def test_the_loss_falls(name: str) -> None:
    task = toy_task(1, METHODS[name])
    untuned = held_out_loss(task, task.model)
    if name == "hermits":  # they never see the base: compare with themselves before
        run = simulate(METHODS[name], 1)
        assert reference(name).loss() < run.loss()
    else:
        assert reference(name).loss() < 0.97 * untuned


def test_one_client_is_enough(name: str) -> None:
    run = simulate(METHODS[name], rounds_of(METHODS[name]), data=toy_clients(1))
    assert [sorted(record.bytes_up) for record in run.records] == [["a"]] * rounds_of(METHODS[name])


def test_an_empty_client_is_named_and_leaves_no_trace(name: str) -> None:
    data = toy_clients()
    empty = ToyData(data["a"].x[:0], data["a"].y[:0])  # type: ignore[attr-defined]
    assert_left_out(name, empty, "")


def test_a_client_that_fails_half_way_is_named_and_leaves_no_trace(name: str) -> None:
    if name == "prototypes":
        pytest.skip("it reads one batch, and that one is good")
    assert_left_out(name, Failing(toy_clients()["a"].x, toy_clients()["a"].y), "the disk is gone")  # type: ignore[attr-defined]


def test_a_late_client_catches_up_by_the_log(name: str) -> None:
    rounds = rounds_of(METHODS[name])
    run = simulate(METHODS[name], rounds)
    log, algorithm = run.state.log, METHODS[name]
    for version in range(rounds + 1):  # a node that stopped at ``version``, and now hears what it lacks
        task = toy_task(rounds, algorithm)
        public = simulate(algorithm, rounds, until=version).state.public if version else begun(name, task)
        public = replay(task, algorithm, public, log.since(version))
        assert bits(public) == run.public
    everything = log.since(0)
    assert all(codec.decode(record).fingerprint for record in everything.records)


def test_a_client_that_sat_out_pays_for_what_it_missed(name: str) -> None:
    rounds = rounds_of(METHODS[name])
    run = simulate(METHODS[name], rounds, per_round=1, until=1)
    versions: dict[str, int] = {}
    for number in range(1, rounds + 1):
        (record,) = run.records
        (client,) = record.cohort
        version = versions.get(client, 0)
        assert record.bytes_down[client] == simulate_log(name, number - 1).since(version).size
        assert (record.bytes_down[client] == 0) == (version == number - 1)
        versions[client] = number - 1
        assert run.state.versions == versions
        if number < rounds:
            run = simulate(METHODS[name], rounds, per_round=1, until=number + 1)
            run.records = run.records[-1:]


def test_too_few_answers_end_the_run_and_leave_it_as_it_was(name: str) -> None:
    data: dict[str, Any] = toy_clients()
    broken = {client: Failing(rows.x[:0], rows.y[:0]) for client, rows in data.items()}
    rounds = rounds_of(METHODS[name])
    if rounds == 1:
        run = simulate(METHODS[name], 1, until=1)
        with pytest.raises(RunError, match=r"round 1: 1 clients answered, 2 are needed \(b: .*; c: .*\)"):
            simulate(METHODS[name], 1, data={**broken, "a": data["a"]}, min_clients=2)
        return
    shared: dict[str, Any] = dict(data)

    def breaking(engine: Any) -> Any:
        return BreaksInRound(2, engine, shared, broken)

    task = toy_task(rounds, METHODS[name])
    with pytest.raises(RunError, match=r"round 2: 1 clients answered, 2 are needed \(b: .*; c: .*\)"):
        simulate(METHODS[name], rounds, data=shared, min_clients=2, arriving=breaking, task=task)
    run = BreaksInRound.last
    assert run.job.round == 2
    before = simulate(METHODS[name], rounds, until=1)
    assert bits(run.job.public) == before.public
    assert run.job.log.since(0) == before.state.log.since(0)
    assert task is run.job.task


def test_two_identical_clients_are_one(name: str) -> None:
    algorithm = METHODS[name]
    if name in ("hermits", "prototypes", "fedavg-then-ferret"):
        pytest.skip("no mean of payloads")
    if isinstance(getattr(algorithm, "training", None), ZerothOrder):
        pytest.skip("draws directions of its own per client")
    if algorithm.name == "ferret" and (algorithm.keys != "shared" or algorithm.bits < 16):  # type: ignore[attr-defined]
        pytest.skip("draws directions or roundings of its own per client")
    if algorithm.name == "fedavg-8bit":
        pytest.skip("draws roundings of its own per client")
    rows: Any = toy_clients()["a"]
    same = ToyData(rows.x, rows.y, shuffled=False)
    one = simulate(algorithm, 3, data={"a": same})
    two = simulate(algorithm, 3, data={"a": same, "b": same})
    assert two.public == one.public


class BreaksInRound:
    """An engine all of whose clients but the first fail in one round; remembers its last job."""

    last: Any

    def __init__(self, round: int, engine: Any, data: dict[str, Any], broken: dict[str, Any]) -> None:
        self.round, self.engine, self.data, self.broken = round, engine, data, broken
        self.store = engine.store
        BreaksInRound.last = self

    def map(self, job: Any, cohort: Any) -> Iterator[Any]:
        self.job = job
        if job.round == self.round:
            self.data.update({client: self.broken[client] for client in list(cohort)[1:]})
        return self.engine.map(job, cohort)


def assert_left_out(name: str, failing: Any, reason: str) -> None:
    """The run with a failing client is the run without it, and every round names the failure."""
    data = toy_clients()
    rounds = rounds_of(METHODS[name])
    # it comes between the others, so that what it leaves behind would meet the next
    run = simulate(METHODS[name], rounds, data={**data, "ab": failing})
    assert run.public == reference(name).public
    assert bits(run.state.server) == bits(reference(name).state.server)
    for record in run.records:
        (failure,) = record.failures
        assert failure == Failure("ab", "local", failure.reason)
        assert reason in failure.reason
        assert sorted(record.bytes_up) == sorted(data)


def played(name: str) -> Simulation:
    """A run of this row that a test may change, two rounds in where it has two."""
    rounds = rounds_of(METHODS[name])
    return simulate(METHODS[name], rounds, until=min(2, rounds))


def begun(name: str, task: Any) -> Any:
    """The public state before round 1, as every node makes it."""
    return METHODS[name].init(task, Key.of(3, "begin"))[0]


def reply_of(run: Simulation, client: str) -> ClientReply[Any, Any]:
    """What ``client`` would send next."""
    private = run.engine.store.get(client)
    return run.algorithm.client_update(run.task, run.state.public, private, run.data[client], Key.of(1, "local"))


def pool(reply: ClientReply[Any, Any]) -> Pooled[Any]:
    """A round of this one reply, twice."""
    pool: Pool[Any] = Pool()
    pool.add(reply.payload, reply.weight)
    pool.add(reply.payload, 2 * reply.weight)
    return pool.result()


def simulate_log(name: str, round: int) -> Log:
    """The log of a run of one client a round, after ``round``."""
    return simulate(METHODS[name], rounds_of(METHODS[name]), per_round=1, until=round).state.log if round else Log()
