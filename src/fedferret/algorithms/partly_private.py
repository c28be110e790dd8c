"""Base of methods that share some of the tuned weights and leave the others to each client.

    public     all tuned weights; those that are not shared keep the values of the round in which they last were
    client j   its own values P_j of the weights that are not shared; in the beginning the public ones

    client j:  w_j, P_j <- T local steps from w, P_j        Δ_j = w - w_j on the shared weights alone
    server:    Δ = Σ n_j Δ_j / Σ n_j                        everybody: w <- w - η Δ on the shared weights

Wire: 4 s bytes up per client and round, 4 s down, with s shared weights; a client keeps 4 (d - s). Where all weights
are shared it is FedAvg, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedferret.algorithms.fedavg import Delta, FedAvg, FedAvgPublic
from fedferret.algorithms.full_model import deltas, loaded
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Shapes, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import state
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.local.first_order import Trained


@state
class PrivateWeights:
    """One client's own values of the weights that are not shared, fp32."""

    weights: Tree


@dataclass(frozen=True, kw_only=True)
class PartlyPrivate(FedAvg):
    """FedAvg of some weights. A subclass says which, by ``shares``; by ``shared`` where public facts decide."""

    holds_bf16: ClassVar[bool] = False  # private values would be rounded whenever the model is loaded

    def shares(self, names: Iterable[str]) -> list[str]:
        """Select the weights that every client shares.

        Args:
            names: of all tuned weights, in the model's order.

        Returns:
            Those that travel, in the same order; in this base class all of them.
        """
        return list(names)

    def shared(self, task: Task, public: FedAvgPublic) -> list[str]:
        """Select the weights that are shared in the round that follows; a subclass may let public facts decide.

        Args:
            task: model and objective.
            public: the public state after the round before.

        Returns:
            Names in the model's order; in this base class ``shares`` of all tuned weights. A subclass in which
            ``public`` decides replaces ``wire_cost`` too, which knows no public state.
        """
        return self.shares(public.weights)

    def check(self, model: nn.Module, rounds: int) -> None:
        """At least one weight must be shared."""
        super().check(model, rounds)
        if not self.shares(tree.parameters(model)):
            raise UserError(
                f"{self.name}: of what it tunes in this model nothing would be shared; choose other modules"
            )

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes a shared weight, both ways; four bytes at the client for each of the others."""
        total = 4 * sum(math.prod(shape) for shape in shapes.values())
        sent = 4 * sum(math.prod(shapes[name]) for name in self.shares(shapes))
        return WireCost.exact(sent, sent, total - sent)

    def tuned(self, task: Task, public: FedAvgPublic) -> Mapping[str, Tensor]:
        """The shared weights."""
        return {name: public.weights[name] for name in self.shared(task, public)}

    def init_client(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> PrivateWeights | None:  # type: ignore[override]
        """The public values of the weights that are not shared; None where all are."""
        own = {name: value.detach().float().clone() for name, value in self.private_of(task, public, None).items()}
        return PrivateWeights(own) if own else None

    def client_update(  # type: ignore[override]  # FedAvg's clients keep nothing
        self, task: Task, public: FedAvgPublic, client: PrivateWeights | None, data: Examples, key: Key
    ) -> ClientReply[PrivateWeights, Delta]:
        """Train shared and private weights together; send the update of the shared ones, keep the others."""
        shared, private = set(self.shared(task, public)), self.private_of(task, public, client)
        before = {name: private.get(name, weight) for name, weight in public.weights.items()}
        with loaded(task, before):
            trained = self.train(task, public, data, key.fold("train"))
            delta, own = parted(before, trained, shared, private)
        return ClientReply(delta, PrivateWeights(own) if own else None, trained.metrics)

    @contextmanager
    def model(  # type: ignore[override]  # FedAvg's clients keep nothing
        self, task: Task, public: FedAvgPublic, client: PrivateWeights | None = None
    ) -> Iterator[nn.Module | None]:
        """The client's model, or the public values of all weights where these are a model."""
        private = self.private_of(task, public, client)
        if private and client is None and not self.has_global_model:
            yield None
            return
        with loaded(task, {**public.weights, **private}) as model:
            yield model

    def private_of(self, task: Task, public: FedAvgPublic, client: PrivateWeights | None) -> dict[str, Tensor]:
        """A client's values of the weights that are not shared in the round that follows.

        Args:
            task: model and objective.
            public: the public state after the round before.
            client: the client's private state; None before the client's first round.

        Returns:
            Tensors by name, not to be changed: the client's own, and the public ones of weights that the client has no
            value of yet.
        """
        shared, own = set(self.shared(task, public)), client.weights if client else {}
        return {name: own.get(name, weight) for name, weight in public.weights.items() if name not in shared}


def parted(
    before: Mapping[str, Tensor], trained: Trained, shared: Collection[str], private: Iterable[str]
) -> tuple[Delta, dict[str, Tensor]]:
    """Part what a client's training gave.

    Args:
        before: all weights that training began from, by name.
        trained: the training from them.
        shared: names of the weights that every client shares.
        private: names of those that stay at the client.

    Returns:
        The update of the shared weights, and the private ones, fp32.

    Raises:
        UpdateRefused: an update holds NaN or infinity.
    """
    delta = Delta({name: change for name, change in deltas(before, trained) if name in shared})
    return delta, {name: trained.weights[name].detach().float().clone() for name in private}
