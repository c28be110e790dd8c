"""``update_norm`` of every method: what one payload alone would add to the weights, and that the loop bounds it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from contract.methods import METHODS, SENDS_NOTHING, rounds_of
from contract.unlike_methods import UNLIKE
from fedferret.algorithms.fetch_sgd_messages import FetchSGDServer
from fedferret.algorithms.registry import catalogue
from fedferret.algorithms.server_optimizer import Moments
from fedferret.bases.coding import Coding
from fedferret.bases.quantise import pack_vector
from fedferret.core import tree
from fedferret.core.exchanges import ClientUpdate, Failure, Reply
from fedferret.core.intake import Intake
from fedferret.core.keys import Key
from fedferret.core.norms import euclidean_norm
from fedferret.core.pooling import basic_pool, scaled
from fedferret.core.rounds import Plan
from fedferret.engines.in_process import InProcess
from fedferret.wire import codec
from toys import Simulation, simulate, toy_clients

NORMLESS = ("fedlog", "fedpft", "fedpm", SENDS_NOTHING)  # statistics, masks of bits, nothing: a norm has no meaning
ROWS = [name for name, algorithm in METHODS.items() if algorithm not in UNLIKE and algorithm.name not in NORMLESS]


def payload_of(run: Simulation, client: str = "b") -> Any:
    """What a client would send next."""
    private = run.store.get(client)
    return run.algorithm.client_update(run.task, run.state.public, private, run.data[client], Key.of(1)).payload


def inflated(payload: Any, factor: float) -> Any:
    """The payload with every scale, and every value that travels as it is, times ``factor``."""
    coordinates = getattr(payload, "coordinates", None)
    if coordinates is not None and getattr(coordinates, "bits", 1) == 32:
        return replace(payload, coordinates=Coding(32).encode(coordinates.unpack() * factor, Key.of(1)))
    values = getattr(payload, "values", None)
    if getattr(values, "bits", 1) == 32:
        return replace(payload, values=Coding(32).encode(values.unpack() * factor, Key.of(1)))
    vector = getattr(payload, "vector", None)
    if vector is not None and vector.bits == 32:
        return replace(payload, vector=pack_vector(vector.unpack() * factor, 32, Key.of(1)))
    if hasattr(payload, "lengths"):  # what an update is worth is no part of its scale
        return replace(scaled(payload, factor), lengths=payload.lengths)
    return scaled(payload, factor)


def taken(run: Simulation, payload: Any) -> Reply | Failure:
    """What becomes of a reply with this payload in the round after the run's."""
    intake = Intake(run.state.node, Plan(3, 9, 2), float("inf"))
    return intake.take(Reply("b", ClientUpdate(payload, 9, {"loss": 1.0, "seconds": 0.0}), 100))


def tolerance(name: str) -> float:
    """What the server rounds off again, and how far directions are from orthogonal on 97 weights."""
    algorithm = METHODS[name]
    rounded = getattr(algorithm, "entry_bits", 32) < 16 and getattr(algorithm, "keys", "shared") == "shared"
    if getattr(algorithm, "server_rate", 0):  # the server's step on top of the mean depends on what it remembers
        return 0.2
    dense = getattr(algorithm, "basis", "") == "truncated-normal" or name.startswith(("fedkseed", "fetch-sgd", "hiso"))
    return 0.4 if rounded or dense or name == "two-stages" else 1e-3


@pytest.mark.parametrize("name", ROWS)
def test_the_norm_of_an_update_is_what_it_alone_adds_to_the_weights_and_is_bounded(name: str) -> None:
    algorithm = METHODS[name]
    run = simulate(algorithm, rounds_of(algorithm), until=1 if "momentum" in name else 2)
    public, task = run.state.public, run.task
    for momentum in getattr(public, "momentum", {}).values():
        momentum.zero_()  # alone: without what earlier rounds add
    payload = payload_of(run)
    norm = algorithm.update_norm(task, public, payload)
    assert norm is not None
    assert algorithm.update_norm(task, public, inflated(payload, 10.0)) == pytest.approx(10 * norm, rel=1e-2)
    for factor, refused in ((0.5, False), (1e4, True), (float("nan"), True), (float("inf"), True)):
        outcome = taken(run, inflated(payload, factor) if factor < math.inf else scaled(payload, factor))
        assert isinstance(outcome, Failure) == refused, f"{factor}: {outcome}"
        if factor == 1e4:
            assert re.fullmatch(r"the update's norm is \S+: at most \S+ is allowed, 1 \+ .*", outcome.reason)
    pool = basic_pool(algorithm.pooling_at(public))
    pool.add(payload.decoded(), 1.0)
    before = tree.clone(algorithm.tuned(task, public))
    server = None if isinstance(run.state.server, Moments | FetchSGDServer) else run.state.server
    _, entry = algorithm.server_update(task, public, server, pool.result(), Key.of(1))
    algorithm.apply(task, public, codec.decode(codec.encode(entry)))
    moved = euclidean_norm(after - before[key] for key, after in algorithm.tuned(task, public).items())
    assert norm == pytest.approx(moved, rel=tolerance(name)) and moved > 0


def test_every_registered_method_has_a_norm() -> None:
    assert set(catalogue()) <= {METHODS[name].name for name in ROWS} | set(NORMLESS)


@pytest.mark.parametrize("name", ROWS)
def test_a_huge_scale_is_refused_and_leaves_the_run_as_it_would_be_without_it(name: str) -> None:
    """One of two clients: nothing says which of them is right but the size of the model."""

    class Tampering(InProcess):
        factor = 1e30

        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            update, private = super().work(state, client, body, data)
            if client == "b":
                update = replace(update, payload=inflated(update.payload, self.factor))
            return update, private

    data, algorithm = toy_clients(2), METHODS[name]
    attacked = simulate(algorithm, rounds_of(algorithm), until=1, data=data, engine=Tampering)
    alone = simulate(algorithm, rounds_of(algorithm), until=1, data={"a": data["a"]})
    assert attacked.public == alone.public
    (failure,) = attacked.records[0].failures
    assert failure.client == "b" and "\n" not in failure.reason and list(attacked.records[0].metrics) == ["a"]
