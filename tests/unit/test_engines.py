"""Engines: whatever a client sends or does, the others' round goes on, and the report names who, where and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from contract.methods import METHODS
from fedferret.algorithms.fedavg import FedAvg
from fedferret.core.exchanges import Body, Failure, Reply
from fedferret.core.keys import Key
from fedferret.core.rounds import RunState
from fedferret.core.task import Task
from fedferret.engines.client_store import ClientStore, FolderClientStore
from fedferret.engines.debug import ClientError, Debug
from fedferret.engines.in_process import InProcess
from fedferret.wire import codec
from toys import TRAINING, Failing, Rows, SquaredError, ToyData, simulate, toy_clients, toy_model


class Poisoned(SquaredError):
    """A finite loss with a gradient that is not a number where the first input is exactly 9."""

    def loss(self, model: nn.Module, rows: Rows) -> torch.Tensor:
        loss, first = super().loss(model, rows), next(model.parameters())
        return loss + (first * 0).sum().abs().sqrt() if (rows.x[:, 0] == 9).any() else loss


@pytest.mark.parametrize("name", ["fedavg", "ferret", "ferret-per-client"])
def test_nan_in_an_update_is_refused_at_the_client_with_the_tensors_name(name: str) -> None:
    data: dict[str, Any] = toy_clients()
    bad = ToyData(torch.full_like(data["a"].x, 9.0), data["a"].y)
    # one step: a second would already find a loss that is not a number
    method = replace(METHODS[name], training=replace(TRAINING, steps=1))  # type: ignore[call-arg]
    run = simulate(method, 4, data={**data, "ab": bad}, task=Task.of(toy_model(), Poisoned(), 4))
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

    with pytest.raises(ClientError, match="client_update changed the public state"):
        simulate(Careless(training=TRAINING), 1, engine=Debug)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_state_becomes_the_state_by_commit_alone(kind: str, tmp_path: Path) -> None:
    store = ClientStore() if kind == "memory" else FolderClientStore(tmp_path, codec, {})
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
    store = ClientStore() if kind == "memory" else FolderClientStore(tmp_path, codec, {})
    store.stage("a", 1, 1)
    store.commit(1)
    store.stage("a", 2, 2)
    store.stage("b", 2, 2)
    store.withdraw(["a", "nobody"])
    store.commit(2)
    assert (store.get("a"), store.get("b")) == (1, 2)


def test_a_crash_before_a_refusal_is_carried_out_leaves_the_state_from_before_it(tmp_path: Path) -> None:
    store = FolderClientStore(tmp_path, codec, {})
    store.stage("a", 1, 1)
    store.commit(1)
    store.stage("a", 2, 2)  # refused in round 2; the checkpoint is written, and the process ends before ``withdraw``
    store.stage("b", 2, 2)
    again = FolderClientStore(tmp_path, codec, {"a": 1, "b": 2})
    assert (again.get("a"), again.get("b")) == (1, 2)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_client_that_the_engine_leaves_out_is_a_failure_and_those_after_it_count() -> None:
    class Forgetful(InProcess):
        def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterator[Reply | Failure]:
            return super().exchange(dict(list(bodies.items())[1:]), state)

    (record,) = simulate(METHODS["fedavg"], 1, engine=Forgetful).records
    assert [(failure.client, failure.stage) for failure in record.failures] == [(record.cohort[0], "engine")]
    assert set(record.metrics) == set(record.cohort[1:])
