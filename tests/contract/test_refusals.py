"""Whatever a payload claims is checked: every field of every payload, mutated, is one failure with one line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.methods import METHODS, SENDS_NOTHING, reference
from contract.unlike_methods import UNLIKE
from fedferret.algorithms.fedavg import Delta
from fedferret.core.exchanges import ClientUpdate, Failure, Reply
from fedferret.core.intake import Intake
from fedferret.core.keys import Key
from fedferret.core.rounds import Plan
from fedferret.engines.in_process import InProcess
from fedferret.wire import codec
from toys import Simulation, simulate, toy_clients

ROWS = [name for name in METHODS if name not in {SENDS_NOTHING, *(method.name for method in UNLIKE)}]
DRAWN = ("seed", "key", "salt")  # integers that a client draws: any of their range is right


def mutations(value: Any, path: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Wrong versions of a payload, each with a word on what is wrong; one leaf at a time."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            for what, wrong in mutations(getattr(value, field.name), f"{path}.{field.name}"):
                yield what, lambda wrong=wrong, field=field: replace(value, **{field.name: wrong()})
    elif isinstance(value, dict):
        first = next(iter(value))
        for what, wrong in mutations(value[first], f"{path}[{first}]"):
            yield what, lambda wrong=wrong: {**value, first: wrong()}
        yield f"{path}: a name is missing", lambda: dict(list(value.items())[1:])
        yield f"{path}: another name", lambda: {**value, "stranger": value[first]}
    elif isinstance(value, tuple) and value:
        for what, wrong in mutations(value[0], f"{path}[0]"):
            yield what, lambda wrong=wrong: (wrong(), *value[1:])
        yield f"{path}: one too many", lambda: (*value, value[0])
        yield f"{path}: one missing", lambda: value[1:]
    elif isinstance(value, Tensor):
        yield f"{path}: another dimension", lambda: value[None]
        yield f"{path}: another dtype", lambda: value.to(torch.float64 if value.dtype != torch.float64 else torch.int8)
        if value.numel():
            yield f"{path}: one element fewer", lambda: value.reshape(-1)[1:]
            yield f"{path}: one element more", lambda: torch.cat((value.reshape(-1), value.reshape(-1)[:1]))
        if value.is_floating_point() and value.numel():
            yield f"{path}: NaN", lambda: value * torch.nan
            yield f"{path}: infinity", lambda: value.sign() / 0 + torch.inf
        yield f"{path}: no tensor", lambda: 7
    elif isinstance(value, int):
        changed = [-1, 2**70, True, 1.5, "x", None]
        if not path.endswith(DRAWN):
            changed += [value + 1]
        for wrong in changed:
            yield f"{path}: {wrong!r}", lambda wrong=wrong: wrong
    elif isinstance(value, float):
        for wrong in (float("nan"), float("inf"), -1.0, 3, "x", None):
            yield f"{path}: {wrong!r}", lambda wrong=wrong: wrong
    else:
        yield f"{path}: another type", lambda: object


def taken(run: Simulation, payload: Any, **changes: Any) -> tuple[Any, Intake]:
    """What becomes of a reply with this payload in the round after the run's."""
    intake = Intake(run.state.node, Plan(3, 9, 3), float("inf"))
    update = replace(ClientUpdate(payload, 9, {"loss": 1.0, "seconds": 0.1}), **changes)
    return intake.take(Reply("ab", update, 100)), intake


@pytest.mark.parametrize("name", ROWS)
def test_every_field_of_a_payload_is_checked(name: str) -> None:
    run = reference(name)
    client = run.store.get("a")
    # what a client would send next; the run itself stays as it is
    payload = run.algorithm.client_update(run.task, run.state.public, client, run.data["a"], Key.of(1)).payload
    outcome, intake = taken(run, payload)
    assert isinstance(outcome, Reply) and intake.clients == ["ab"]
    seen = 0
    for what, wrong in mutations(payload):
        seen += 1
        try:
            outcome, intake = taken(run, wrong())
            if isinstance(outcome, Reply):  # refused at the latest when it is pooled
                intake.result()
        except Exception as error:  # a strange payload must not end the round
            pytest.fail(f"{what} raised {type(error).__name__}: {error}")
        assert isinstance(outcome, Failure), f"{what} was accepted"
        assert intake.clients == [] and "\n" not in outcome.reason, what
    assert seen >= 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"payload": 7}, "a int came where a payload was expected"),
        ({"payload": Delta({})}, "tensors are not the model's"),
        ({"num_examples": 0}, "states 0 examples: must be a whole number, at least 1"),
        ({"num_examples": -3}, "states -3 examples"),
        ({"num_examples": 2.5}, "states 2.5 examples"),
        ({"num_examples": True}, "states True examples"),
        ({"num_examples": float("nan")}, "states nan examples"),
        ({"metrics": None}, "metrics came that are no numbers"),
        ({"metrics": {"loss": "low"}}, "metrics came that are no numbers"),
    ],
)
def test_what_an_update_states_beside_its_payload_is_checked(changes: dict[str, Any], reason: str) -> None:
    run = reference("fedavg")
    payload = run.algorithm.client_update(run.task, run.state.public, None, run.data["a"], Key.of(1)).payload
    outcome, intake = taken(run, **{"payload": payload, **changes})
    assert isinstance(outcome, Failure) and re.search(reason, outcome.reason) and intake.clients == []


def test_an_update_longer_than_the_formula_is_refused_before_anything_else() -> None:
    class Long(InProcess):
        def _outcome(self, *given: Any) -> Any:
            outcome = super()._outcome(*given)
            return replace(outcome, bytes_up=outcome.bytes_up + 2000) if outcome.client == "ab" else outcome

    data = toy_clients()
    run = simulate(METHODS["ferret"], 2, data={**data, "ab": data["a"]}, engine=Long)
    assert run.public == simulate(METHODS["ferret"], 2).public
    for record in run.records:
        (failure,) = record.failures
        assert failure.client == "ab" and re.match(
            r"sent 2,\d+ bytes; an update of this round has at most", failure.reason
        )


@pytest.mark.parametrize("name", ["fedavg", "ferret", "ferret-per-client", "fedkseed", "fedavg-top-k", "fedavg-8bit"])
def test_a_refused_client_leaves_the_run_as_it_would_be_without_it(name: str) -> None:
    class Tampering(InProcess):
        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            update, private = super().work(state, client, body, data)
            return (replace(update, payload=first_wrong(update.payload)) if client == "ab" else update), private

    def first_wrong(payload: Any) -> Any:
        return next(wrong for what, wrong in mutations(payload) if "one element more" in what)()

    data = toy_clients()
    run = simulate(METHODS[name], 4, data={**data, "ab": data["a"]}, engine=Tampering)
    assert run.public == reference(name).public
    for record in run.records:
        (failure,) = record.failures
        assert (failure.client, failure.stage) == ("ab", "pool") and "ab" not in record.bytes_up
    assert codec.encode(run.store.get("ab")) == codec.encode(None)
