"""A round's updates on their way into the pool: each is checked when it comes, and pooled when its weight is known.

    weights known at once       pooled at once: one update in memory
    weights bounded by all      every accepted payload waits in a temporary file until the last claim is known

Whatever an update holds becomes one failure with one line; nothing that a client sends raises here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedferret.core.algorithm import Payload, Pooled, Pooling, Weighting
from fedferret.core.exchanges import ClientUpdate, Failure, Masked, Reply
from fedferret.core.node import Node
from fedferret.core.pooling import NotFinite, basic_pool, nonfinite, tensors
from fedferret.core.spool import Place, Spool
from fedferret.core.weighting import bounded_clients, weights_of

if TYPE_CHECKING:
    from fedferret.core.rounds import Plan


@dataclass(frozen=True)
class Accepted:
    """What stays of an accepted update once its payload is in the pool."""

    num_examples: int
    metrics: Mapping[str, float]
    bytes_up: int


class Intake:
    """Takes one round's outcomes in client order."""

    def __init__(self, node: Node, plan: Plan, longest: float) -> None:
        """``longest``: bytes that an update may have."""
        self.accepted: dict[str, Accepted] = {}
        self.failures: list[Failure] = []
        self._node, self._plan, self._longest = node, plan, longest
        self._weighting: Weighting = "equal" if node.guards else node.algorithm.weighting_at(node.public)
        self._masked = next((guard.modulus for guard in node.guards if guard.modulus is not None), None)
        pooling = node.algorithm.pooling_at(node.public)
        self._pool = plan.pool.pool(pooling) if self._masked is None else basic_pool(Pooling.SUM)
        self._needs_norm = plan.pool.name == "norm-bounded-mean"
        self._spool: Spool | None = None  # payloads that wait for their weights
        self._places: list[Place] = []
        if plan.bounds is not None and self._weighting == "examples":
            self._spool = Spool(tempfile.TemporaryFile())  # noqa: SIM115  # closed with the round's intake

    @property
    def clients(self) -> list[str]:
        """The clients of accepted updates, in order."""
        return list(self.accepted)

    def take(self, outcome: Reply | Failure) -> Reply | Failure:
        """Accept a reply, or note the failure; returns what became of it."""
        if isinstance(outcome, Reply):
            try:
                self._accept(outcome)
                return outcome
            except ValueError as error:
                outcome = Failure(outcome.client, "pool", str(error))
            except OSError:
                raise  # the disk is full: no fault of this client
            except Exception as error:  # whatever a strange payload may raise
                outcome = Failure(outcome.client, "pool", f"{type(error).__name__}: {error}")
        self.failures.append(outcome)
        return outcome

    def result(self) -> Pooled[Any]:
        """The pooled sums of all that was accepted."""
        if self._spool is not None:
            codec, weights = self._node.codec, self._weights()
            for place, weight in zip(self._places, weights, strict=True):
                self._add(codec.decode(self._spool.get(place)), weight)
            self._spool = None
        return self._pool.result()

    def bounded(self) -> tuple[str, ...]:
        """The clients with a claim of examples that counted for less than it said."""
        clients = self.clients
        places = bounded_clients(self._claims(), self._weighting, self._plan.bounds)
        return tuple(clients[place] for place in places)

    def _accept(self, reply: Reply) -> None:
        update = reply.body
        if not isinstance(update, ClientUpdate):
            raise ValueError(f"sent a {type(update).__name__} where a ClientUpdate was expected")
        if reply.bytes_up > self._longest:
            raise ValueError(f"sent {reply.bytes_up:,} bytes; an update of this round has at most {self._longest:,.0f}")
        check_claims(update)
        node = self._node
        if self._masked is not None:
            check_masked(update.payload, self._masked)
            node.algorithm.accept_sum(node.task, node.public, update.payload.sum)
        elif not isinstance(update.payload, Payload):
            raise ValueError(f"a {type(update.payload).__name__} came where a payload was expected")
        else:
            node.algorithm.accept(node.task, node.public, update.payload)
        if self._spool is None:
            weight = 1.0 if self._weighting == "equal" else float(update.num_examples)
            self._add(update.payload, weight)
        else:
            wrong = nonfinite(update.payload.decoded())
            if wrong is not None:
                raise NotFinite(f"{wrong} holds NaN or infinity")
            self._places.append(self._spool.put(node.codec.encode(update.payload)))
        # the payload is in the pool; keeping it would cost a model per client
        self.accepted[reply.client] = Accepted(update.num_examples, update.metrics, reply.bytes_up)

    def _add(self, payload: Any, weight: float) -> None:
        node = self._node
        norm = node.algorithm.update_norm(node.task, node.public, payload) if self._needs_norm else None
        self._pool.add(payload if isinstance(payload, Masked) else payload.decoded(), weight, norm)

    def _claims(self) -> list[int]:
        return [update.num_examples for update in self.accepted.values()]

    def _weights(self) -> tuple[float, ...]:
        return weights_of(self._claims(), self._weighting, self._plan.bounds)


def check_claims(update: ClientUpdate) -> None:
    """Refuse, with a ValueError, a number of examples or metrics that cannot be."""
    examples = update.num_examples
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(f"states {examples!r} examples: must be a whole number, at least 1")
    if not isinstance(update.metrics, dict) or not all(isinstance(value, float) for value in update.metrics.values()):
        raise ValueError("metrics came that are no numbers")


def check_masked(payload: Any, modulus: int) -> None:
    """Refuse, with a ValueError, what is no sum of integers below ``modulus``."""
    if not isinstance(payload, Masked) or payload.modulus != modulus:
        raise ValueError(f"a {type(payload).__name__} came where a sum modulo {modulus} was expected")
    for name, tensor in tensors(payload.sum):
        if tensor.is_floating_point() or (tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < modulus):
            raise ValueError(f"{name} holds values that are no integers from 0 to {modulus - 1}")
