"""FibecFed: FedIT with a curriculum over examples, of the most sensitive layers alone, and of some neurons per client.

Liu et al. "Fisher Information-based Efficient Curriculum Federated Learning with Large Language Models", EMNLP 2024,
arXiv 2410.00131, as its abstract and summaries describe it. There is no public code; every constant is ours.

    client j, once:    f_i = Σ g_i² over the LoRA factors, g_i the gradient of example i alone     order: by f_i
    round 1:           up: I_l, how much layer l's output changes under noise, as shares of their sum
                       server: the ceil(q L) layers with the largest Σ n_j I_l^j                   down: their numbers
    round t of T:      examples: the first min(1, β + (1 − β) t / (α T)) of the order
                       T local steps on the rows of A and of B with the most Fisher information F_j
                       up and down: the factors of the chosen layers, averaged as in FedIT
    every R rounds:    F_j <- γ F_j + (1 − γ) F of the present examples, and the rows are chosen again

Wire: 4 L bytes up and 4 ceil(q L) down in round 1, L layers with factors; then 4 s each way, s the weights of chosen
layers and of no layer. A client keeps 4 (d − s), 5 per row and 4 per example. With q = 1 no round scores layers.
Deviations, and what is ours: docs/methods/fibecfed.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from fedferret.algorithms.fedavg import FedAvgEntry
from fedferret.algorithms.fedit import FedIT, adam
from fedferret.algorithms.fibecfed_client import FisherCurriculum
from fedferret.algorithms.fibecfed_messages import (
    ChosenLayers,
    FibecFedClient,
    FibecFedPublic,
    Sensitivities,
    check_shares,
    factors_of,
    sent_values,
)
from fedferret.algorithms.full_model import loaded
from fedferret.algorithms.partly_private import PartlyPrivate, parted
from fedferret.algorithms.server_optimizer import Moments
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Pooled, Shapes, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.curriculum import part_of
from fedferret.local.first_order import FirstOrder
from fedferret.local.sensitivity import sensitivities
from fedferret.models.layers import layers_named, layers_of


@dataclass(frozen=True, kw_only=True)
class FibecFed(FisherCurriculum, PartlyPrivate, FedIT):
    """LoRA of chosen layers, of chosen rows, on easy examples first. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fibecfed"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    layers: float = 0.5  # q: halves the bytes; the paper's own rule is not public
    noise: float = 0.01  # ρ: small beside the hidden states, large beside fp32's rounding
    training: FirstOrder = field(default_factory=adam)  # FedIT's

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_shares()
        if not 0 < self.layers <= 1:
            raise UserError(f"layers={self.layers}: must be a share above 0 and at most 1")
        if not 0 < self.noise < math.inf:
            raise UserError(f"noise={self.noise}: must be above 0 and finite")

    def check(self, model: nn.Module, rounds: int) -> None:
        """There must be layers to choose among, and a round beside the one that scores them."""
        super().check(model, rounds)
        if self.layers == 1:
            return
        found, known = layers_named(tree.parameters(model)), layers_of(model)
        if not found or found.keys() - known.keys():
            raise UserError('fibecfed: no layer of this model has factors; set modules="all-linear", or layers=1')
        if part_of(len(found), self.layers) == len(found):
            raise UserError(
                f"layers={self.layers}: of {len(found)} layers with factors these are all; "
                + ("give a smaller share, or " if len(found) > 1 else "give ")
                + "layers=1, which needs no round to score them"
            )
        if rounds < 2:
            raise UserError(f"rounds={rounds}: the first round scores layers; set rounds=2 or more, or layers=1")

    def note(self, public: FibecFedPublic) -> str | None:  # type: ignore[override]
        """Which layers are averaged, where they were chosen."""
        if public.chosen is None or self.layers == 1:
            return None
        names = list(public.layers)
        return f"of {len(names)} layers these are averaged: {', '.join(names[number] for number in public.chosen)}"

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes a layer in the scoring round, then four a shared weight; layers may differ in size."""
        layers, least, most, total = sent_values(shapes, self.layers)
        measured = 5 * sum(shapes[name][0] for name in factors_of(shapes)) if self.kept_neurons < 1 else 0
        measured += 4 if self.curriculum_start < 1 else 0  # of one example: how many a client has is not known here
        if round == 1 and self.layers < 1:
            return WireCost.exact(4 * layers, 4 * part_of(layers, self.layers), measured)
        return WireCost(4 * least, 4 * most, 4 * least, 4 * most, 4 * (total - least) + measured)

    def shared(self, task: Task, public: FibecFedPublic) -> list[str]:  # type: ignore[override]
        """The weights of chosen layers and of no layer; none while layers are scored."""
        if public.chosen is None:
            return []
        groups = enumerate(public.layers.values())
        private = {name for number, names in groups if number not in public.chosen for name in names}
        return [name for name in public.weights if name not in private]

    def accept(self, task: Task, public: FibecFedPublic, payload: Any) -> None:  # type: ignore[override]
        """Refuse what is no distribution over the layers, and later what is no update of the shared weights."""
        if public.chosen is None:
            check_shares(payload, len(public.layers), values=True)
        else:
            super().accept(task, public, payload)

    def accept_sum(self, task: Task, public: FibecFedPublic, sum: Any) -> None:  # type: ignore[override]
        """Refuse a sum of other names or shapes."""
        if public.chosen is None:
            check_shares(sum, len(public.layers), values=False)
        else:
            super().accept_sum(task, public, sum)

    def update_norm(self, task: Task, public: FibecFedPublic, payload: Any) -> float | None:  # type: ignore[override]
        """That of the update; shares of layers have none."""
        return None if public.chosen is None else super().update_norm(task, public, payload)

    def init(self, task: Task, key: Key) -> tuple[FibecFedPublic, None]:
        """The first factors; with q = 1 all layers are chosen."""
        weights = task.store(tree.parameters(task.model))
        chosen = tuple(range(len(layers_named(weights)))) if self.layers == 1 else None
        return FibecFedPublic(weights, chosen, key.fold("noise").value), None

    def init_client(  # type: ignore[override]
        self, task: Task, public: FibecFedPublic, data: Examples, key: Key
    ) -> FibecFedClient | None:
        """Score the client's examples and rows, whenever it joins; None where nothing is to be kept."""
        with loaded(task, public.weights):
            measured = self.first_measured(task, data, key)
        return measured if self.measures or self.layers < 1 else None

    def client_update(  # type: ignore[override]
        self, task: Task, public: FibecFedPublic, client: FibecFedClient | None, data: Examples, key: Key
    ) -> ClientReply[FibecFedClient, Any]:
        """Score the layers; later train on the prefix, send the shared weights' update and keep the others."""
        if public.chosen is None:
            return self._score(task, public, client, data)
        shared, private = set(self.shared(task, public)), self.private_of(task, public, client)
        before, scoring = {**public.weights, **private}, int(self.layers < 1)
        with loaded(task, before):
            if client is not None:
                share = self.share(task.round - scoring, task.rounds - scoring)
                client = self.refreshed(task, client, data, share, key)
                data = self.part(client, data, share)
            mask = client.mask(before) if client else None
            trained = self.training.train(task, data, key.fold("train"), mask=mask)
            delta, own = parted(before, trained, shared, private)
        after = client and replace(client, weights=own, trained=client.trained + 1)
        return ClientReply(delta, after, trained.metrics)

    def server_update(  # type: ignore[override]
        self, task: Task, public: FibecFedPublic, server: Moments | None, pooled: Pooled[Any], key: Key
    ) -> tuple[Moments | None, ChosenLayers | FedAvgEntry]:
        """The layers with the largest mean shares are the entry; later the mean update is."""
        if public.chosen is not None:
            return super().server_update(task, public, server, pooled, key)
        shares = pooled.only.shares.cpu().double()
        largest = shares.argsort(descending=True, stable=True)[: part_of(len(shares), self.layers)]
        return None, ChosenLayers(largest.sort().values.int())

    def apply(self, task: Task, public: FibecFedPublic, entry: ChosenLayers | FedAvgEntry) -> None:  # type: ignore[override]
        """Note the chosen layers, or step the shared weights."""
        if isinstance(entry, ChosenLayers):
            public.chosen = tuple(entry.layers.tolist())
        else:
            super().apply(task, public, entry)

    def _score(
        self, task: Task, public: FibecFedPublic, client: FibecFedClient | None, data: Examples
    ) -> ClientReply[FibecFedClient, Sensitivities]:
        with loaded(task, public.weights) as model:
            known = layers_of(model)
            first, layers = next(iter(known.values())), [known[name] for name in public.layers]
            size = self.training.batch_size
            changes, loss = sensitivities(task, first, layers, data, self.noise, size, Key(public.noise))
        return ClientReply(Sensitivities.of(changes), client, {"loss": loss})
