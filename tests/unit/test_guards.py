"""The guard's seam, proved by an identity, by a change of the sum, and by a toy secure sum with a lost client."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from contract.methods import METHODS, reference
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.ferret import Ferret
from fedferret.core.algorithm import Pooling
from fedferret.core.errors import UserError
from fedferret.core.exchanges import Body, ClientUpdate, Failure, Masked, Reply, Score, Train
from fedferret.core.guard import Guard, RoundSecret
from fedferret.core.keys import Key
from fedferret.core.node import Node
from fedferret.core.pooling import leaves, mapped
from fedferret.core.rounds import RunState
from fedferret.engines.in_process import InProcess
from fedferret.engines.remote import Remote
from fedferret.wire import codec
from toy_guards import MODULUS, Advertise, Identity, ToySecureSum, Unmask
from toy_sites import BASE, RECIPE, Direct, toy_trainer
from toys import HELD_OUT, TRAINING, bits, simulate, toy_clients, toy_task, weights

EQUAL = FedAvg(weighting="equal", training=TRAINING)
PRIVATE = Ferret(**{**Ferret.presets["private"], "coordinates": 60}, training=TRAINING)


def guarded(algorithm: Any, guards: Any, folder: Path | None = None, **options: Any) -> Any:
    """A run of two rounds under guards: in this process, or at sites with a folder each."""
    if folder is None:
        return simulate(algorithm, 2, guards=guards, **options)

    def engine(data: Any, given: Any, store: Any) -> Remote:
        made = {
            name: toy_trainer(algorithm, 2, {name: rows}, folder / name, name, guards=guards)
            for name, rows in data.items()
        }
        return Remote(Direct(made), given, recipe=RECIPE, base=BASE, deadline=60.0, store=store)

    return simulate(algorithm, 2, guards=guards, engine=engine, **options)


AVERAGED = [
    name
    for name, method in METHODS.items()
    if method.pooling is not Pooling.EACH and name not in ("drift", "two-stages")
]


@pytest.mark.parametrize("name", AVERAGED)
def test_an_identity_guard_changes_no_bit_but_forces_equal_weights(name: str) -> None:
    algorithm = METHODS[name]
    equal = replace(algorithm, weighting="equal") if has_weighting(algorithm) else algorithm  # type: ignore[call-arg]
    assert guarded(algorithm, [Identity()]).public == simulate(equal, 2).public


def has_weighting(algorithm: Any) -> bool:
    return any(field.name == "weighting" for field in dataclasses.fields(algorithm))


class Shifting(Guard):
    """Adds to every float: what a clipping or a noise would do."""

    def on_client(self, sum: Any, client: str, secret: RoundSecret, randomness: Any) -> Any:
        return mapped(lambda x: x + 1.0 if isinstance(x, torch.Tensor) and x.is_floating_point() else x, sum)


@pytest.mark.parametrize("name", ["fedavg", "fedavg-8bit", "ferret", "ferret-half-a-bit-shared"])
def test_a_changed_sum_travels_in_the_methods_code(name: str) -> None:
    half = Ferret(**{**Ferret.presets["one-bit"], "coordinates": 8, "group_size": 8}, training=TRAINING)
    algorithm: Any = METHODS.get(name, half)
    node, _ = Node.start(toy_task(1), algorithm, 3, codec, guards=[Shifting()])
    plain, _ = Node.start(toy_task(1), algorithm, 3, codec)
    shifted_reply, plain_reply = (each.handle(Train(1), "a", None, toy_clients()["a"])[0] for each in (node, plain))
    assert type(shifted_reply.payload) is type(plain_reply.payload)
    assert codec.size(shifted_reply.payload) == pytest.approx(codec.size(plain_reply.payload), abs=16)
    algorithm.accept(node.task, node.public, shifted_reply.payload)
    assert bits(shifted_reply.payload) != bits(plain_reply.payload)


@pytest.mark.parametrize("where", ["in this process", "at sites"])
@pytest.mark.parametrize("algorithm", [EQUAL, PRIVATE], ids=["fedavg", "ferret"])
def test_a_masked_sum_is_the_mean_in_fixed_point_wherever_the_clients_are(
    where: str, algorithm: Any, tmp_path: Path
) -> None:
    run = guarded(algorithm, [ToySecureSum()], tmp_path if where == "at sites" else None)
    plain = simulate(algorithm, 2)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(run)[name], weight, rtol=0, atol=2e-3)
    assert all(record.failures == () for record in run.records)


def test_every_reply_of_every_exchange_is_read_to_its_end_before_the_next() -> None:
    """Between a client's start and its outcome, an error of the server is booked against the client."""
    heard: list[tuple[str, str]] = []

    def engine(data: Any, given: Any, store: Any) -> InProcess:
        return InProcess(data, given, store, lambda client: heard.append(("start", client)))

    guarded(
        EQUAL, [ToySecureSum()], engine=engine, on_outcome=lambda outcome: heard.append(("outcome", outcome.client))
    )
    assert len(heard) == 2 * 4 * 2 * 3, "of two rounds with four exchanges, start and outcome of three clients"
    for (what, client), (end, same) in zip(heard[::2], heard[1::2], strict=True):
        assert (what, end, client) == ("start", "outcome", same)


class LosesAfterMasking(InProcess):
    """Client "b" sends its masked sum too late: the server hears of it no more."""

    def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterator[Reply | Failure]:
        for outcome in super().exchange(bodies, state):
            lost = outcome.client == "b" and isinstance(bodies["b"], Train)
            yield Failure("b", "wire", "connection lost") if lost else outcome


def test_a_client_that_drops_out_after_masking_leaves_the_mean_of_the_others() -> None:
    run = guarded(EQUAL, [ToySecureSum()], engine=LosesAfterMasking)
    others = {client: rows for client, rows in toy_clients().items() if client != "b"}
    plain = simulate(EQUAL, 2, data=others)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(run)[name], weight, rtol=0, atol=2e-3)
    assert [failure.client for record in run.records for failure in record.failures] == ["b", "b"]


def crossed(algorithm: Any, guards: Any) -> dict[str, set[str]]:
    """Every field that crossed the wire in a run, by direction and message."""
    seen: dict[str, set[str]] = defaultdict(set)

    class Watching(InProcess):
        def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterator[Reply | Failure]:
            for body in bodies.values():
                seen[f"down {type(body).__name__}"] |= {path for path, _ in leaves(body)}
            for outcome in super().exchange(bodies, state):
                assert isinstance(outcome, Reply)
                seen[f"up {type(outcome.body).__name__}"] |= {path for path, _ in leaves(outcome.body)}
                yield outcome

    guarded(algorithm, guards, engine=Watching)
    return {direction: fields - {""} for direction, fields in seen.items()}


def test_everything_that_crosses_the_wire_under_a_guard_is_listed() -> None:
    """Norms, metrics and counts would say what a guard hides: none of them crosses; the 1 is every client's."""
    found = crossed(PRIVATE, [ToySecureSum()])
    assert found == {
        "down Advertise": {"round"},
        "up Advertised": {"public"},
        "down Share": {"round", "public[a]", "public[b]", "public[c]"},
        "up Shared": {"exponent"},
        "down Train": {"round"},
        "up ClientUpdate": {
            "payload.sum.coordinates",
            "payload.sum.norms",
            "payload.modulus",
            "num_examples",
        },
        "down Unmask": {"round"},
        "up Unmasked": set(),
    }
    plain = crossed(PRIVATE, [])
    assert plain["up ClientUpdate"] - {"num_examples"} >= {"payload.norms", "metrics[loss]", "metrics[seconds]"}


def test_no_two_rounds_and_no_two_runs_have_the_same_masks_and_none_follows_from_the_seed() -> None:
    seen: list[bytes] = []

    class Watching(InProcess):
        def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterator[Reply | Failure]:
            for outcome in super().exchange(bodies, state):
                if isinstance(outcome, Reply) and outcome.client == "a" and isinstance(outcome.body, ClientUpdate):
                    seen.append(bits(outcome.body.payload.sum))
                yield outcome

    first, second = (guarded(EQUAL, [ToySecureSum()], engine=Watching) for _ in range(2))
    assert len(seen) == len(set(seen)) == 4 and first.public == second.public  # masks differ; what they hide does not


def test_a_rounds_secret_lives_for_one_round_and_is_in_no_memory_that_is_kept(tmp_path: Path) -> None:
    run = guarded(EQUAL, [ToySecureSum()], folder=None)
    node: Node = run.state.node
    assert {secret.round for secret in node._secrets.values()} == {2}
    kept = bits((run.state.public, run.state.server, run.state.log.since(0).records))
    for secret in node._secrets.values():
        assert isinstance(secret, RoundSecret)
        assert codec.encode(secret.values["exponent"])[3:-4] not in kept
    with pytest.raises(TypeError):  # a secret is no message: nothing writes it down
        codec.encode(secret)


def test_the_secret_of_a_client_that_sits_the_next_round_out_ends_with_its_round() -> None:
    run = guarded(EQUAL, [ToySecureSum()], per_round=2)
    first, second = (set(record.cohort) for record in run.records)
    assert first != second
    secrets = run.state.node._secrets
    assert set(secrets) == second and {secret.round for secret in secrets.values()} == {2}


def test_guards_apply_in_order_at_the_client_and_are_undone_in_reverse() -> None:
    order: list[str] = []

    class Noted(Identity):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_client(self, sum: Any, client: str, secret: Any, randomness: Any) -> Any:
            order.append(f"{self.name} at {client}")
            return sum

        def on_server(self, pooled: Any, answered: Any, received: Any) -> Any:
            order.append(f"{self.name} at the server")
            return pooled

    simulate(EQUAL, 1, data=toy_clients(1), guards=[Noted("first"), Noted("second")])
    assert order == ["first at a", "second at a", "second at the server", "first at the server"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda masked: masked.sum, "a Delta came where a sum modulo"),
        (lambda masked: replace(masked, modulus=97), "a Masked came where a sum modulo"),
        (lambda masked: replace(masked, sum=shifted(masked.sum, MODULUS)), "holds values that are no integers from 0"),
        (lambda masked: replace(masked, sum=shifted(masked.sum, 0.5)), "holds values that are no integers from 0"),
        (lambda masked: replace(masked, sum=narrow(masked.sum)), "holds values that are no integers from 0"),
        (lambda masked: replace(masked, sum=replace(masked.sum, delta={})), "tensors are not the model's"),
        (lambda masked: replace(masked, sum=Masked(masked.sum, 2)), "a sum of type Masked came where a Delta"),
    ],
)
def test_a_masked_sum_that_cannot_be_is_refused(change: Any, reason: str) -> None:
    class Tampering(InProcess):
        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            reply, private = super().work(state, client, body, data)
            if client == "b" and isinstance(body, Train):
                reply = replace(reply, payload=change(reply.payload))
            return reply, private

    (record,) = simulate(EQUAL, 1, guards=[ToySecureSum()], engine=Tampering).records
    (failure,) = record.failures
    assert (failure.client, failure.stage) == ("b", "pool") and reason in failure.reason


def narrow(sum: Any) -> Any:
    return replace(sum, delta={name: tensor.clamp(max=9).int() for name, tensor in sum.delta.items()})


@pytest.mark.parametrize("name", ["fedavg", "fedavg-8bit", "ferret", "fedkseed"])
def test_a_sum_that_poses_as_the_methods_is_refused(name: str) -> None:
    """The first sum of a round sets the form of all: one of another type with equal parts would shut the others out."""
    run = reference(name)
    payload = run.algorithm.client_update(run.task, run.state.public, None, run.data["a"], Key.of(1)).payload
    run.algorithm.accept_sum(run.task, run.state.public, payload.decoded())
    with pytest.raises(ValueError, match=r"sum"):
        run.algorithm.accept_sum(run.task, run.state.public, SimpleNamespace(**vars(payload.decoded())))


def test_a_reply_of_another_kind_than_the_exchanges_is_one_failure() -> None:
    class Tampering(InProcess):
        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            reply, private = super().work(state, client, body, data)
            return (Train(1) if client == "b" and isinstance(body, Advertise) else reply), private

    (record,) = simulate(EQUAL, 1, guards=[ToySecureSum()], engine=Tampering).records
    (failure,) = record.failures
    assert failure == Failure("b", "advertise", "sent a Train where a Advertised was expected")


def shifted(sum: Any, by: float) -> Any:
    return replace(sum, delta={name: tensor + by for name, tensor in sum.delta.items()})


def test_a_guard_on_payloads_that_are_kept_apart_is_one_line() -> None:
    with pytest.raises(UserError, match="ToySecureSum: the payloads of ferret are kept apart and never added up"):
        simulate(METHODS["ferret-per-client"], 1, guards=[ToySecureSum()])


def test_bodies_of_guards_are_messages() -> None:
    body = Unmask(1, ("b",), {"b": 7})
    assert codec.decode(codec.encode(body)) == body and dataclasses.is_dataclass(body)


def test_under_a_guard_no_client_scores() -> None:
    node = simulate(EQUAL, 1, guards=[Identity()]).state.node
    with pytest.raises(ValueError, match="would tell what the guards of this run hide"):
        node.handle(Score(1, 4), "a", None, HELD_OUT)
