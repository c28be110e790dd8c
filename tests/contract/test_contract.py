"""What every method promises, whatever it does; each test is named after its law."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.methods import METHODS, reference, rounds_of
from fedferret.algorithms.registry import catalogue
from fedferret.core.algorithm import ClientReply, Pooled, Pooling
from fedferret.core.by_round import state_bytes_by_round
from fedferret.core.errors import RunError
from fedferret.core.exchanges import Body, Failure
from fedferret.core.keys import Key
from fedferret.core.messages import framing_bytes
from fedferret.core.node import Node
from fedferret.core.pooling import basic_pool, tensors
from fedferret.core.rounds import RunState
from fedferret.core.stages import Staged
from fedferret.core.task import Task
from fedferret.engines.debug import Debug
from fedferret.local.zeroth_order import ZerothOrder
from fedferret.wire import codec
from toy_sites import simulate_sites, sites
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

FINGERPRINT = 66  # the toy's log has one in every record
FRAMING_PER_ENTRY = 200  # bytes of type names and lengths


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    """Every row in turn."""
    return str(request.param)


def test_every_registered_method_has_a_row() -> None:
    assert set(catalogue()) <= {method.name for method in METHODS.values()}


def test_same_key_same_bits_and_no_global_generator_moves(name: str) -> None:
    """The second time on the engine that compares the public state before and after a client's work."""
    before = torch.get_rng_state()
    again = simulate(METHODS[name], rounds_of(METHODS[name]), engine=Debug)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.memory == reference(name).memory
    assert again.history() == reference(name).history()


def test_another_seed_gives_other_bits(name: str) -> None:
    if name in ("prototypes", "fedlog"):
        pytest.skip("draws nothing in round 1: means and sums do not depend on the order of rows")
    assert simulate(METHODS[name], rounds_of(METHODS[name]), until=1, seed=4).memory != reference(name).memory


def test_client_update_and_server_update_change_none_of_their_inputs(name: str) -> None:
    run = two_rounds(name)
    client, data, public = "b", run.data["b"], run.state.public
    private = run.store.get(client) or run.algorithm.init_client(run.task, public, data, Key.of(1, "join"))
    before = bits((public, private, run.state.server))
    reply = run.algorithm.client_update(run.task, public, private, data, Key.of(1, "local"))
    assert bits((public, private, run.state.server)) == before
    pooled = pool(run, reply)
    pooled_before = bits((pooled.sums, pooled.weights))
    _, entry = run.algorithm.server_update(run.task, public, run.state.server, pooled, Key.of(1, "update"))
    assert bits((public, private, run.state.server)) == before
    assert bits((pooled.sums, pooled.weights)) == pooled_before
    entry_before = bits(entry)
    run.algorithm.apply(run.task, public, codec.decode(entry_before))
    entry = codec.decode(entry_before)
    run.algorithm.apply(run.task, public, entry)
    assert bits(entry) == entry_before


def test_looking_at_the_model_changes_nothing(name: str) -> None:
    run = two_rounds(name)
    before = run.memory
    first = run.loss()
    run.loss()
    assert run.memory == before
    assert run.loss() == first


def test_stopped_saved_loaded_and_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    rounds = rounds_of(METHODS[name])
    first = simulate(METHODS[name], rounds, until=min(2, rounds), folder=tmp_path)
    second = simulate(METHODS[name], rounds, folder=tmp_path)
    assert second.memory == reference(name).memory
    assert first.history() + second.history() == reference(name).history()


@pytest.mark.parametrize(
    "row", ["fedavg", "ferret", "ferret-error-feedback", "fedkseed", "two-stages", "hermits", "spafl"]
)
def test_the_same_bits_through_node_whoever_calls_it(row: str, tmp_path: Path) -> None:
    """A replica behind requests, with a log and private states on disk, and the server's node: one row per payload."""
    algorithm, rounds = METHODS[row], rounds_of(METHODS[row])
    remote = simulate_sites(algorithm, rounds, sites(algorithm, rounds, tmp_path))
    assert remote.public == reference(row).public
    assert bits(remote.state.server) == bits(reference(row).state.server)
    assert remote.history() == reference(row).history()


def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    backwards = simulate(METHODS[name], rounds_of(METHODS[name]), arriving=Backwards)
    assert backwards.memory == reference(name).memory
    assert backwards.history() == reference(name).history()


def test_every_message_and_state_survives_the_codec(name: str) -> None:
    run = two_rounds(name)
    reply = reply_of(run, "b")
    _, entry = run.algorithm.server_update(run.task, run.state.public, run.state.server, pool(run, reply), Key.of(1))
    for value in (reply.payload, entry, reply.client, run.state.public, run.state.server):
        encoded = codec.encode(value)
        decoded = codec.decode(encoded)
        assert type(decoded) is type(value)
        assert codec.encode(decoded) == encoded
        assert codec.size(value) == len(encoded)


def test_a_payload_shares_no_memory_with_any_state(name: str) -> None:
    run = two_rounds(name)
    private = run.store.get("b")
    reply = reply_of(run, "b")
    sent = {tensor.untyped_storage().data_ptr() for _, tensor in tensors(reply.payload)}
    kept = [tensor for part in (run.state.public, private, reply.client) for _, tensor in tensors(part)]
    kept += [weight.detach() for weight in run.task.model.parameters()]
    assert not sent & {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel()}


def test_what_crosses_the_wire_lies_between_the_formulas_least_and_most(name: str) -> None:
    run, cohort, algorithm = reference(name), len(toy_clients()), METHODS[name]
    shapes_by_round, snapshot = shapes_of(algorithm, rounds_of(algorithm)), codec.size(run.state.public)
    for record in run.records:
        shapes = shapes_by_round(record.round)
        cost = algorithm.wire_cost(shapes, cohort, record.round)
        for up in record.bytes_up.values():
            assert cost.up_least <= up <= cost.up_most + framing_bytes(shapes)
        if record.round == 1:
            assert set(record.bytes_down.values()) == {0}  # everybody has the base
            continue
        before = shapes_by_round(record.round - 1)
        cost = algorithm.wire_cost(before, cohort, record.round - 1)
        for down in record.bytes_down.values():  # on this small model the log sometimes folds
            assert min(snapshot, cost.down_least) <= down
            assert down <= cost.down_most + cohort * FRAMING_PER_ENTRY + framing_bytes(before) + FINGERPRINT


def test_a_formula_of_one_length_is_met_to_the_byte(name: str) -> None:
    """All tensors of a payload together have the formula's bytes, up to a scale of 8 bytes for each code."""
    run, algorithm = two_rounds(name), METHODS[name]
    number = run.state.round + 1 if rounds_of(algorithm) > 1 else 1
    cost = algorithm.wire_cost(shapes_of(algorithm, rounds_of(algorithm))(number), len(run.data), number)
    payload = reply_of(run, "b").payload
    found = sum(tensor.numel() * tensor.itemsize for _, tensor in tensors(payload))
    found += 8 * (name == "hermits")  # a float
    assert cost.up_least <= found <= cost.up_most


def test_what_a_client_keeps_is_the_formula_and_bounded_framing(name: str) -> None:
    algorithm, last = METHODS[name], rounds_of(METHODS[name])
    shapes = shapes_of(algorithm, last)(last)
    kept = algorithm.wire_cost(shapes, len(toy_clients()), last).client_state_bytes
    for client in toy_clients():
        assert kept <= codec.size(reference(name).store.get(client)) <= kept + framing_bytes(shapes)


def test_states_are_no_larger_than_what_is_stated_before_the_run(name: str) -> None:
    """Stages may hand over less than they could, and few layers are chosen at a time; others are met up to names."""
    algorithm, rounds, run = METHODS[name], rounds_of(METHODS[name]), reference(name)
    task = toy_task(rounds, algorithm)
    skeleton = Task.of(copy.deepcopy(task.model).to("meta"), task.objective, rounds)
    stated = state_bytes_by_round(algorithm, skeleton, len(run.data), len(run.data), codec)(rounds)
    framing = framing_bytes(shapes_of(algorithm, rounds)(rounds))
    found = {"public": run.state.public, "server": run.state.server, "client": run.store.get("b")}
    for memory, state in found.items():
        size, most = codec.size(state), getattr(stated, memory)
        assert size <= most + (framing if memory == "client" else 48 * (1 + len(run.data))), (memory, size, most)
        assert most <= size + framing or isinstance(algorithm, Staged), (memory, size, most)


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
    if name in ("prototypes", "fedpeptao", "fedpeptao-spectrum"):
        pytest.skip("it reads one batch, at least in one round, and that one is good")
    assert_left_out(name, Failing(toy_clients()["a"].x, toy_clients()["a"].y), "the disk is gone")  # type: ignore[attr-defined]


def test_a_late_client_catches_up_by_the_log(name: str) -> None:
    rounds, algorithm = rounds_of(METHODS[name]), METHODS[name]
    run = reference(name)
    new, _ = Node.start(toy_task(rounds, algorithm), algorithm, 3, codec)
    stopped = simulate(algorithm, rounds, until=min(2, rounds)).state.node
    for node in (new, stopped):
        node.catch_up(run.state.log.since(node.version))
        assert bits(node.public) == run.public and node.version == rounds
    everything = run.state.log.since(0)
    assert all(codec.decode(record).fingerprint for record in everything.records)


def test_a_client_that_sat_out_pays_for_what_it_missed(name: str) -> None:
    missed: list[int] = []
    versions: dict[str, int] = {}

    def watching(engine: Any) -> Any:
        plain = engine.exchange

        def exchange(bodies: Mapping[str, Body], state: RunState) -> Iterator[Any]:
            assert state.versions == versions
            (client,) = bodies
            missed.append(state.log.since(versions.get(client, 0)).size)
            assert (missed[-1] == 0) == (versions.get(client, 0) == state.round)
            versions[client] = state.round
            yield from plain(bodies, state)

        engine.exchange = exchange
        return engine

    run = simulate(METHODS[name], rounds_of(METHODS[name]), per_round=1, arriving=watching)
    assert [sum(record.bytes_down.values()) for record in run.records] == missed


def test_too_few_clients_end_the_run_and_leave_it_as_it_was(name: str) -> None:
    data: dict[str, Any] = toy_clients()
    broken = {client: Failing(rows.x[:0], rows.y[:0]) for client, rows in data.items()}
    rounds = rounds_of(METHODS[name])
    if rounds == 1:
        with pytest.raises(RunError, match=r"round 1: 1 clients replied, 2 are needed \(b: .*; c: .*\)"):
            simulate(METHODS[name], 1, data={**broken, "a": data["a"]}, min_clients=2)
        return
    shared: dict[str, Any] = dict(data)

    def breaking(engine: Any) -> Any:
        return BreaksInRound(2, engine, shared, broken)

    with pytest.raises(RunError, match=r"round 2: 1 clients replied, 2 are needed \(b: .*; c: .*\)"):
        simulate(METHODS[name], rounds, data=shared, min_clients=2, arriving=breaking)
    state = BreaksInRound.last
    assert (state.round, state.node.version) == (1, 1)
    before = simulate(METHODS[name], rounds, until=1)
    assert bits(state.public) == before.public
    assert state.log.since(0) == before.state.log.since(0)


def draws_nothing(algorithm: Any) -> bool:
    """Whether payloads are averaged, and depend on the client's data alone: no directions or roundings of a client."""
    if algorithm.name.startswith("ferret"):
        return bool(algorithm.keys == "shared" and algorithm.bits >= 16)
    if algorithm.name in ("uni-lora", "fed-sb"):
        return bool(algorithm.pooling is Pooling.MEAN and min(algorithm.bits, algorithm.entry_bits) >= 16)
    if getattr(algorithm, "where", None) == "client":  # FedPTR's clients draw synthetic sets
        return False
    zeroth = isinstance(getattr(algorithm, "training", None), ZerothOrder)
    return (
        algorithm.pooling is Pooling.MEAN
        and not zeroth
        and algorithm.name not in ("fedavg-8bit", "fedpm", "two-stages")
    )


@pytest.mark.parametrize("name", [name for name, algorithm in METHODS.items() if draws_nothing(algorithm)])
def test_two_identical_clients_are_one(name: str) -> None:
    algorithm = METHODS[name]
    rows: Any = toy_clients()["a"]
    same = ToyData(rows.x, rows.y, shuffled=False)
    one = simulate(algorithm, 3, data={"a": same})
    two = simulate(algorithm, 3, data={"a": same, "b": same})
    assert two.public == one.public


class BreaksInRound:
    """An engine all of whose clients but the first fail in one round; remembers the state it was last given."""

    last: RunState

    def __init__(self, round: int, engine: Any, data: dict[str, Any], broken: dict[str, Any]) -> None:
        self.round, self.engine, self.data, self.broken = round, engine, data, broken

    def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterator[Any]:
        BreaksInRound.last = state
        if state.round + 1 == self.round:
            self.data.update({client: self.broken[client] for client in list(bodies)[1:]})
        yield from self.engine.exchange(bodies, state)

    def commit(self, round: int, refused: Sequence[str]) -> None:
        self.engine.commit(round, refused)


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


def two_rounds(name: str) -> Simulation:
    """A run of this row that a test may change, two rounds in where it has two."""
    rounds = rounds_of(METHODS[name])
    return simulate(METHODS[name], rounds, until=min(2, rounds))


def reply_of(run: Simulation, client: str) -> ClientReply[Any, Any]:
    """What ``client`` would send next."""
    private = run.store.get(client)
    return run.algorithm.client_update(run.task, run.state.public, private, run.data[client], Key.of(1, "local"))


def pool(run: Simulation, reply: ClientReply[Any, Any]) -> Pooled[Any]:
    """A round of this one reply, twice."""
    pool = basic_pool(run.algorithm.pooling_at(run.state.public))
    pool.add(reply.payload.decoded(), 3.0)
    pool.add(reply.payload.decoded(), 6.0)
    return pool.result()
