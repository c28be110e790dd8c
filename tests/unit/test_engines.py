"""Engines: whatever a client sends or does, the others' round goes on, and the report names who, where and why."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from contract.methods import METHODS, reference
from fedferret.algorithms.fedavg import Delta, FedAvg
from fedferret.algorithms.ferret import KeyedReply, SharedReply
from fedferret.core.algorithm import Task
from fedferret.core.keys import Key
from fedferret.core.rounds import ClientUpdate, Failure, Job
from fedferret.engines.client_store import ClientStore, FolderClientStore
from fedferret.engines.debug import ClientError, Debug
from fedferret.engines.in_process import Envelope, InProcess
from fedferret.wire import codec
from toys import TRAINING, Failing, Rows, Simulation, ToyData, simulate, squared_error, toy_clients, toy_model

Tamper = Callable[[bytes], bytes]


def tampering(tamper: Tamper) -> type[InProcess]:
    """An engine in which the client "ab" sends something else than it meant."""

    class Tampering(InProcess):
        def work(self, job: Any, client: str, data: Any) -> tuple[bytes, Any]:
            encoded, private = super().work(job, client, data)
            return (tamper(encoded) if client == "ab" else encoded), private

    return Tampering


def with_guest(name: str, tamper: Tamper) -> Simulation:
    """The row's run, with one more client whose messages are tampered with."""
    data = toy_clients()
    return simulate(METHODS[name], 4, data={**data, "ab": data["a"]}, engine=tampering(tamper))


def envelope(change: Callable[[Envelope], Any]) -> Tamper:
    """Tamper with the contents of an intact message."""
    return lambda encoded: codec.encode(change(codec.decode(encoded)))


def flipped(encoded: bytes) -> bytes:
    middle = len(encoded) // 2
    return encoded[:middle] + bytes([encoded[middle] ^ 1]) + encoded[middle + 1 :]


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda encoded: b"", "WireError: message of 0 bytes: truncated"),
        (lambda encoded: b"garbage that is no message", "not a fedferret message"),
        (lambda encoded: encoded[:-5], "checksum differs"),
        (flipped, "checksum differs"),
        (envelope(lambda e: e.payload), "where an Envelope was expected"),
        (envelope(lambda e: 7), "a int came where an Envelope was expected"),
        (envelope(lambda e: replace(e, payload=7)), "holds no payload"),
        (envelope(lambda e: replace(e, weight="many")), "holds no payload with a weight"),
        (envelope(lambda e: replace(e, metrics={"loss": "low"})), "weight and metrics"),
        (envelope(lambda e: replace(e, metrics=None)), "weight and metrics"),
    ],
)
def test_garbage_is_a_failure_on_the_wire_and_the_run_goes_on(tamper: Tamper, reason: str) -> None:
    assert_refused("ferret", tamper, "wire", reason)


SHARED = [
    (lambda e: replace(e, weight=float("nan")), "weight nan: must be positive and finite"),
    (lambda e: replace(e, weight=0.0), "weight 0.0: must be positive and finite"),
    (lambda e: replace(e, payload=Delta({})), "a Delta came: the client plays with other settings"),
    (lambda e: replace(e, payload=KeyedReply(e.payload.coordinates, e.payload.norms, 3)), "a KeyedReply came"),
    (
        lambda e: replace(e, payload=replace(e.payload, norms=e.payload.norms[1:])),
        "3 block norms came, 4 were expected",
    ),
    (lambda e: replace(e, payload=replace(e.payload, norms="loud")), ""),
    (lambda e: packed(e, length=59), "59 coordinates came, 60 were expected"),
    (lambda e: packed(e, scale=float("nan")), "NaN or infinity"),
    (lambda e: packed(e, scale=float("inf")), "NaN or infinity"),
    (lambda e: packed(e, scale="big"), ""),
    (lambda e: packed(e, bits=3), "contradict|is not one of"),
    (lambda e: packed(e, codes=e.payload.coordinates.codes[1:]), "is not one of"),
    (lambda e: packed(e, codes=None), ""),
]


def packed(e: Envelope, **changes: Any) -> Envelope:
    return replace(e, payload=replace(e.payload, coordinates=replace(e.payload.coordinates, **changes)))


@pytest.mark.parametrize(("change", "reason"), SHARED)
def test_an_answer_that_cannot_belong_to_the_round_is_refused(change: Any, reason: str) -> None:
    assert_refused("ferret", envelope(change), "pool", reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: packed(e, scale=float("nan")), "coordinates holds NaN or infinity"),
        (lambda e: replace(e, payload=SharedReply(e.payload.coordinates, e.payload.norms)), "a SharedReply came"),
        (lambda e: replace(e, payload=replace(e.payload, key=-1)), "-1 is no key"),
        (lambda e: replace(e, payload=replace(e.payload, key=2**64)), "is no key"),
        (lambda e: replace(e, payload=replace(e.payload, key="mine")), ""),
        (lambda e: replace(e, payload=replace(e.payload, norms=e.payload.norms.float() * torch.nan)), ""),
    ],
)
def test_answers_that_are_kept_apart_are_checked_too(change: Any, reason: str) -> None:
    assert_refused("ferret-per-client", envelope(change), "pool", reason)


def nan_in_codes(e: Envelope) -> Envelope:
    codes = e.payload.coordinates.codes.clone()
    codes[:4] = torch.tensor(list(struct.pack("<f", float("nan"))), dtype=torch.uint8)
    return packed(e, codes=codes)


def test_nan_hidden_in_full_precision_coordinates_is_refused() -> None:
    assert_refused("ferret-32-bits", envelope(nan_in_codes), "pool", "NaN or infinity")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: {name: value for name, value in list(d.items())[1:]}, "tensors are not the model's"),
        (lambda d: {name: value.reshape(-1)[:1] for name, value in d.items()}, "tensors are not the model's"),
        (lambda d: {name: value.half() for name, value in d.items()}, "tensors are not the model's"),
        (lambda d: {name: value / 0 for name, value in d.items()}, r"delta\[0.weight\] holds NaN or infinity"),
        (lambda d: 7, "AttributeError"),
        (lambda d: dict.fromkeys(d, 7), "AttributeError"),
    ],
)
def test_a_change_of_another_model_is_refused(change: Any, reason: str) -> None:
    assert_refused("fedavg", envelope(lambda e: replace(e, payload=Delta(change(e.payload.delta)))), "pool", reason)


def assert_refused(name: str, tamper: Tamper, stage: str, reason: str) -> None:
    """The guest is named in every round, and the others' run is what it would be without it."""
    import re

    run = with_guest(name, tamper)
    assert run.public == reference(name).public
    for record in run.records:
        (failure,) = record.failures
        assert (failure.client, failure.stage) == ("ab", stage)
        assert re.search(reason, failure.reason), failure.reason
        assert "ab" not in record.bytes_up


def poisoned(model: nn.Module, rows: Rows) -> torch.Tensor:
    """A finite loss whose gradient is not a number where the first input is exactly 9."""
    loss = squared_error(model, rows)
    first = next(model.parameters())
    return loss + (first * 0).sum().abs().sqrt() if (rows.x[:, 0] == 9).any() else loss


@pytest.mark.parametrize("name", ["fedavg", "ferret", "ferret-per-client"])
def test_nan_in_an_update_is_refused_at_the_client_with_the_tensors_name(name: str) -> None:
    data: dict[str, Any] = toy_clients()
    bad = ToyData(torch.full_like(data["a"].x, 9.0), data["a"].y)
    # one step: a second would already find a loss that is not a number
    method = replace(METHODS[name], training=replace(TRAINING, steps=1))  # type: ignore[call-arg]
    run = simulate(method, 4, data={**data, "ab": bad}, task=Task(toy_model(), poisoned, 4))
    assert run.public == simulate(method, 4).public
    for record in run.records:
        (failure,) = record.failures
        assert (failure.client, failure.stage) == ("ab", "local")
        assert "the update of 0.weight holds NaN or infinity" in failure.reason


def test_a_loss_that_is_not_finite_is_refused_and_says_at_which_step() -> None:
    data: dict[str, Any] = toy_clients()
    bad = ToyData(data["a"].x * float("inf"), data["a"].y)
    run = simulate(METHODS["fedavg"], 1, data={**data, "ab": bad})
    (failure,) = run.records[0].failures
    assert "the loss is nan at step 1" in failure.reason


def test_the_debug_engine_stops_at_the_first_failure_and_shows_the_data() -> None:
    data: dict[str, Any] = toy_clients()
    failing = Failing(data["a"].x, data["a"].y)
    with pytest.raises(ClientError) as raised:
        simulate(METHODS["fedavg"], 2, data={**data, "ab": failing}, engine=Debug)
    text = str(raised.value)
    assert text.startswith(
        "client 'ab' failed in round 1, stage local: OSError: the disk is gone (9 examples, failed at"
    )
    assert "Rows(x=tensor" in text and "\n" not in text and len(text) < 400
    assert isinstance(raised.value.__cause__, OSError)


def test_the_debug_engine_catches_a_method_that_changes_the_public_state() -> None:
    class Careless(FedAvg):
        def client_update(self, task: Any, public: Any, client: Any, data: Any, key: Key) -> Any:
            reply = super().client_update(task, public, client, data, key)
            next(iter(public.weights.values())).add_(1)
            return reply

    with pytest.raises(ClientError, match="local changed the public state"):
        simulate(Careless(training=TRAINING), 1, engine=Debug)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_state_becomes_the_state_by_commit_alone(kind: str, tmp_path: Path) -> None:
    store = ClientStore() if kind == "memory" else FolderClientStore(tmp_path, codec, 0)
    store.stage("a", 1, 1)
    assert store.get("a") is None
    store.commit(1)
    store.stage("a", 2, 2)
    assert store.get("a") == 1 and store.get("b") is None
    store.withdraw(["a"])
    store.commit(2)
    assert store.get("a") == 1
    assert len(list(tmp_path.iterdir())) == (kind == "folder")


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_refused_client_stays_what_it_was(kind: str, tmp_path: Path) -> None:
    store = ClientStore() if kind == "memory" else FolderClientStore(tmp_path, codec, 0)
    store.stage("a", 1, 1)
    store.commit(1)
    store.stage("a", 2, 2)
    store.stage("b", 2, 2)
    store.withdraw(["a", "nobody"])
    store.commit(2)
    assert (store.get("a"), store.get("b")) == (1, 2)


def test_a_client_that_the_engine_leaves_out_is_a_failure_and_those_after_it_count() -> None:
    class Forgetful(InProcess):
        def map(self, job: Job, cohort: Sequence[str]) -> Iterator[ClientUpdate | Failure]:
            return super().map(job, cohort[1:])

    (record,) = simulate(METHODS["fedavg"], 1, engine=Forgetful).records
    assert [(failure.client, failure.stage) for failure in record.failures] == [(record.cohort[0], "engine")]
    assert set(record.metrics) == set(record.cohort[1:])
