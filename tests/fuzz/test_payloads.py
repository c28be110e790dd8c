"""Every method's payload, mutated field by field: refused with one line, or nothing that could do harm is in it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.methods import METHODS, reference
from contract.unlike_methods import UNLIKE
from fedferret.core.exchanges import ClientUpdate, Failure, Reply
from fedferret.core.intake import Intake
from fedferret.core.keys import Key
from fedferret.core.pooling import nonfinite, tensors
from fedferret.core.rounds import Plan, longest_update
from fedferret.core.weighting import Bounds
from fedferret.wire import codec
from fuzz.mutations import mutated
from toys import Simulation

EXAMPLES = 200
FORMS = ("ferret-32-bits", "ferret-16-bits", "ferret-1-bit", "ferret-half-a-bit", "ferret-per-client", "ferret-columns")
FORMS = (*FORMS, "fedavg-2-bits", "fedavg-top-k-forgetful", "fedkseed-many-directions", "two-stages")


def rows() -> list[str]:
    """The first row of every method, and those with payloads of another form."""
    unlike = {method.name for method in UNLIKE}
    first = {algorithm.name: name for name, algorithm in reversed(METHODS.items())}
    return [name for name in METHODS if (name in first.values() or name in FORMS) and name not in unlike]


def update_of(run: Simulation, client: str) -> ClientUpdate:
    """What a client would send in the round after the run's last; the run stays as it is."""
    private = run.store.get(client)
    reply = run.algorithm.client_update(run.task, run.state.public, private, run.data[client], Key.of(1, client))
    return ClientUpdate(reply.payload, len(run.data[client]), dict(reply.metrics))


def received(run: Simulation, update: Any, intake: Intake, client: str) -> Reply | Failure:
    """What becomes of an update that crosses the wire."""
    try:
        encoded = codec.encode(update)
        decoded = codec.decode(encoded)
    except ValueError as error:  # an integer of no message; or refused when it is decoded
        return intake.take(Failure(client, "wire", str(error)))
    return intake.take(Reply(client, decoded, len(encoded)))


def committed(run: Simulation, intake: Intake) -> Any:
    """The public state after the round, on a copy."""
    public = codec.decode(run.public)
    server, pooled = codec.decode(codec.encode(run.state.server)), intake.result()
    _, entry = run.algorithm.server_update(run.task, public, server, pooled, Key.of(1, "update"))
    run.algorithm.apply(run.task, public, codec.decode(codec.encode(entry)))
    return public


@pytest.mark.parametrize("name", rows())
def test_a_mutated_payload_is_one_failure_or_within_cost_kinds_and_bounds(name: str) -> None:
    run = reference(name)
    honest, wrong = update_of(run, "a"), update_of(run, "b")
    node, most = run.state.node, longest_update(run.state.node, 3, run.state.round)
    size = sum(float(each.double().square().sum()) for _, each in tensors(run.state.public)) ** 0.5
    seen = {Reply: 0, Failure: 0}

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**64 - 1))  # one draw: a draw for every choice takes longer than all the rest
    def law(seed: int) -> None:
        choose = random.Random(seed).randrange
        update: Any = wrong
        for _ in range(1 + choose(2)):
            if isinstance(update, ClientUpdate) and choose(8):
                update = ClientUpdate(mutated(update.payload, choose), update.num_examples, update.metrics)
            else:
                update = mutated(update, choose)
        intake = Intake(node, Plan(3, 9, 3, bounds=Bounds() if choose(2) else None), most)
        assert isinstance(intake.take(Reply("a", honest, 100)), Reply)
        outcome = received(run, update, intake, "b")
        seen[type(outcome)] += 1
        if isinstance(outcome, Failure):
            assert intake.clients == ["a"] and [each.client for each in intake.failures] == ["b"]
            assert outcome.reason.isprintable() and 0 < len(outcome.reason) <= 300
            return
        assert outcome.bytes_up <= most
        norm = run.algorithm.update_norm(run.task, run.state.public, outcome.body.payload)
        assert nonfinite(committed(run, intake)) is None or (norm is not None and not norm <= 1 + size)

    law()
    assert seen[Failure] > EXAMPLES / 4
