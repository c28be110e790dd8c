"""SpaFL's form for language models: the thresholds of gates over a frozen transformer are averaged.

After Kim, Saad, Debbah, Hong, NeurIPS 2024, arXiv 2406.00431 (``spafl.py``), who report that thresholds alone improve a
model with frozen weights. Gates, and thresholds relative to a row's magnitude, are ours.

    model:     a gate before each intermediate neuron and each attention head, open where s < 1; s = 0 at first
    client j:  T local steps on all s, with the loss + α Σ exp(-s)
    server:    the mean of the s, unweighted

All clients have the same frozen weights, so there are no weights that an importance update could move, and the mean is
a global model. A classifier's head is trained densely beside the gates, and shared unless it is private.

Wire: 4 d bytes up per client and round, 4 d down, with d = layers (neurons + heads), and a shared head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from fedferret.algorithms.fedavg import Delta, FedAvgPublic
from fedferret.algorithms.partly_private import PartlyPrivate, PrivateWeights
from fedferret.algorithms.spafl_steps import AlphaSchedule, alpha_of, check_pressure, sparsity
from fedferret.core.algorithm import ClientReply, Weighting
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder, Trained
from fedferret.models import adapters
from fedferret.models.classifiers import HEAD


def _training() -> FirstOrder:
    """Of ours: Adam moves every s alike, and s has to go from 0 to 1."""
    return FirstOrder(optimizer="adamw", learning_rate=0.03, clip=None)


@dataclass(frozen=True, kw_only=True)
class SpaFLGates(PartlyPrivate):
    """The unweighted mean of the gates' thresholds."""

    name: ClassVar[str] = "spafl-gates"
    gates: adapters.Gated = "neurons-and-heads"  # what costs a block's compute; either can be left alone
    alpha: float = 0.0  # α, the pressure towards closed gates; 0: only gates that harm the loss close
    alpha_schedule: AlphaSchedule = "constant"  # as SpaFL's
    alpha_rounds: int = 1  # as SpaFL's
    window: adapters.Window = "unit"  # margins 1 - s with a gradient: below s = 0 a gate is open and stays so
    initial_threshold: float = 0.0  # s: every gate is open at first, so the model is its base
    private_head: bool = False  # True: a classifier's head stays at its client
    weighting: Weighting = "equal"  # as SpaFL's
    training: FirstOrder = field(default_factory=_training)

    def shares(self, names: Iterable[str]) -> list[str]:
        """All, or all but a classifier's head."""
        return [name for name in names if not (self.private_head and name.startswith(HEAD))]

    def check(self, model: nn.Module, rounds: int) -> None:
        """Ranges."""
        check_pressure(self.alpha, self.alpha_rounds, self.initial_threshold)
        super().check(model, rounds)

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with gates."""
        return adapters.Gates(of=self.gates, window=self.window, initial=self.initial_threshold).attach(model, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The model with what is read behind closed gates set to 0."""
        return adapters.released(model)

    def client_update(  # type: ignore[override]  # FedAvg's clients keep nothing
        self, task: Task, public: FedAvgPublic, client: PrivateWeights | None, data: Examples, key: Key
    ) -> ClientReply[PrivateWeights, Delta]:
        """Train the thresholds; say which share of the weights is behind open gates."""
        reply = super().client_update(task, public, client, data, key)
        return ClientReply(reply.payload, reply.client, {**reply.metrics, "density": adapters.open_share(task.model)})

    def train(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> Trained:
        """Local steps with α Σ exp(-s), and the rule for layers without open gates."""
        alpha = alpha_of(self.alpha, self.alpha_schedule, self.alpha_rounds, task.round)
        return self.training.train(task, data, key, adjust=sparsity(lambda: adapters.gate_masks(task.model), alpha))

    def note(self, public: FedAvgPublic) -> str | None:
        """How many gates are open, where that is not all."""
        thresholds = [weight for name, weight in public.weights.items() if name.endswith(adapters.GATE)]
        total = sum(len(each) for each in thresholds)
        closed = sum(int((each >= 1).sum()) for each in thresholds)
        return f"{total - closed:,} of {total:,} gates are open" if closed else None
