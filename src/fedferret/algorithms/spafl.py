"""SpaFL: every client trains and keeps a sparse model; the thresholds that make it sparse are averaged.

Kim, Saad, Debbah, Hong. "SpaFL: Communication-Efficient Federated Learning with Sparse Models and Low Computational
Overhead", NeurIPS 2024, arXiv 2406.00431. Formulas are those of the authors' code.

    model j:   row i of a weight is masked where mean_k |w_ik| <= τ_i (``models/adapters/row_thresholds.py``)
    client j:  w_j, τ_j <- T steps from its own w_j and the common τ, on loss + α Σ exp(-τ_i)
               a layer of which at most 1% of the rows are kept has its τ set to 0; sends τ - τ_j
    server:    τ_new = mean of the τ_j, unweighted           d = τ_new - τ
    everyone:  w_ik <- w_ik - sign(Σ_k w_ik) d_i / c, sampled or not; c = inputs of a linear module, k² of a convolution

    public     τ, every round's d, and the base weights, from which every client begins
    client j   w_j, and how many of the d were applied to it; those missed are applied in order before w_j is used

Wire: 4 N bytes up per client and round, 4 N down, N thresholds; for a client that was away 4 N a round missed. A client
keeps 4 bytes a weight; public state grows by 4 N bytes a round.

Deviations, in docs/methods/spafl.md: the straight-through gradient has the right window, density counts parameters,
biases of masked rows are masked too. Updates of thresholds travel instead of thresholds, with the same mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import Delta, FedAvgEntry, FedAvgPublic
from fedferret.algorithms.full_model import step_
from fedferret.algorithms.partly_private import PartlyPrivate, PrivateWeights
from fedferret.algorithms.spafl_steps import AlphaSchedule, alpha_of, caught_up, check_pressure, sparsity
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Shapes, StateBytes, Weighting
from fedferret.core.keys import Key
from fedferret.core.messages import state
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.local.first_order import FirstOrder, Trained
from fedferret.models import adapters


@state
class SpaFLPublic(FedAvgPublic):
    """The thresholds of now and the weights of the base; and every round's d, by threshold, shape (rounds, R)."""

    differences: Tree


@state
class SpaFLClient(PrivateWeights):
    """One client's weights, and how many rounds' d were applied to them."""

    applied: int


def _training() -> FirstOrder:
    """The optimiser of the authors' code for CIFAR-10; a round is five passes there."""
    return FirstOrder(learning_rate=0.01, momentum=0.9, clip=3.0, batch_size=16)


@dataclass(frozen=True, kw_only=True)
class SpaFL(PartlyPrivate):
    """The unweighted mean of the thresholds; weights stay at their clients."""

    name: ClassVar[str] = "spafl"
    has_global_model: ClassVar[bool] = False  # the public weights are the base's, which the thresholds are not for
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-code": {  # for CIFAR-10
            "window": "inverted",
            "alpha": 1.5e-4,
            "mask_head": True,
            "training": {"learning_rate": 0.01, "momentum": 0.9, "clip": 3.0, "batch_size": 16, "epochs": 5},
        },
    }
    alpha: float = 0.002  # α, the pressure towards sparsity; the code's for LeNet-5
    alpha_schedule: AlphaSchedule = "constant"  # as for CIFAR-10; "sigmoid": α / (1 + exp(5 - 10 t/n))
    alpha_rounds: int = 1  # n of the sigmoid, t from 0; with the code's 1 the first round alone has a small α
    window: adapters.Window = "unit"  # margins with a gradient, |q| <= 1; weights this large have no use for thresholds
    importance_update: bool = True  # False: weights do not follow the thresholds, the paper's ablation
    fan_in: Literal["kernel", "whole"] = "kernel"  # c of a convolution: k² as in the code, or inputs times k²
    initial_threshold: float = 0.0  # every row is kept at first, as in the code
    modules: str | tuple[str, ...] | None = None  # all linear modules and convolutions of the body
    mask_head: bool = False  # a masked row of the head is a class that is never named; the code masks it but in ResNet
    weighting: Weighting = "equal"  # the paper's mean counts every client once
    training: FirstOrder = field(default_factory=_training)

    def shares(self, names: Iterable[str]) -> list[str]:
        """The thresholds."""
        return [name for name, _ in adapters.threshold_names(list(names))]

    def check(self, model: nn.Module, rounds: int) -> None:
        """Ranges."""
        check_pressure(self.alpha, self.alpha_rounds, self.initial_threshold)
        super().check(model, rounds)

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with thresholds."""
        thresholds = adapters.RowThresholds(
            window=self.window, initial=self.initial_threshold, modules=self.modules, head=self.mask_head
        )
        return thresholds.attach(model, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The model with masked rows set to 0."""
        return adapters.released(model)

    def tuned(self, task: Task, public: FedAvgPublic) -> Mapping[str, Tensor]:
        """All weights: thresholds begin at 0, and say nothing of how large the model is that an update changes."""
        return public.weights

    def state_growth(self, model: nn.Module, shapes: Shapes, round: int, clients: int) -> StateBytes:
        """A d a round."""
        grown = super().state_growth(model, shapes, round, clients)
        each = self.wire_cost(shapes, 1, round).up_most if self.importance_update else 0
        return replace(grown, public=round * each)

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, Any]:
        """The base weights, the first thresholds, and no d."""
        public, server = super().init(task, key)
        none = {name: public.weights[name].new_zeros(0, len(public.weights[name])) for name in self._shared(public)}
        return SpaFLPublic(public.weights, none if self.importance_update else {}), server

    def client_update(  # type: ignore[override]  # what is kept says how far the weights are
        self, task: Task, public: SpaFLPublic, client: SpaFLClient | None, data: Examples, key: Key
    ) -> ClientReply[PrivateWeights, Delta]:
        """Train weights and thresholds together; send the update of the thresholds, keep the weights."""
        reply = super().client_update(task, public, client, data, key)
        metrics = {**reply.metrics, "density": adapters.density(task.model)}  # of what training left in the model
        return ClientReply(reply.payload, self._kept(public, reply.client), metrics)

    def init_client(self, task: Task, public: SpaFLPublic, data: Examples, key: Key) -> SpaFLClient | None:  # type: ignore[override]
        """The base weights with every d so far applied: those of a client that was there from the beginning."""
        return self._kept(public, super().init_client(task, public, data, key))

    def train(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> Trained:
        """Local steps with α Σ exp(-τ), and the rule for layers without rows."""
        alpha = alpha_of(self.alpha, self.alpha_schedule, self.alpha_rounds, task.round)
        return self.training.train(task, data, key, adjust=sparsity(lambda: adapters.row_masks(task.model), alpha))

    def apply(self, task: Task, public: SpaFLPublic, entry: FedAvgEntry) -> None:  # type: ignore[override]
        """τ <- τ - η Δ; what this changed, d, joins those of earlier rounds."""
        thresholds = self._sent(task, public)
        before = tree.clone(thresholds)
        step_(thresholds, entry.delta, entry.learning_rate, task.rounding)
        if self.importance_update:
            public.differences = {
                name: torch.cat((public.differences[name], (after - before[name])[None]))
                for name, after in thresholds.items()
            }

    def private_of(self, task: Task, public: SpaFLPublic, client: SpaFLClient | None) -> dict[str, Tensor]:  # type: ignore[override]
        """A client's weights with every d that they missed applied, in order."""
        private = super().private_of(task, public, client)
        missed = {name: rounds[client.applied if client else 0 :] for name, rounds in public.differences.items()}
        return caught_up(private, missed, self.fan_in)

    def _kept(self, public: SpaFLPublic, private: PrivateWeights | None) -> SpaFLClient | None:
        """Private weights that stand where ``public`` does."""
        applied = len(next(iter(public.differences.values()), ()))
        return None if private is None else SpaFLClient(private.weights, applied)

    def _sent(self, task: Task, public: FedAvgPublic) -> dict[str, Tensor]:
        """The thresholds."""
        return {name: public.weights[name] for name in self._shared(public)}

    def _shared(self, public: FedAvgPublic) -> list[str]:
        return self.shares(public.weights)
