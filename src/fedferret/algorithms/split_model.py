"""FedPer, FedRep and LG-FedAvg: a classifier in two parts, one averaged and the other each client's own.

                 body          head          a client's local training
    FedPer       averaged      private       T steps on both parts together
    FedRep       averaged      private       k T steps on the head with the body fixed, then T on the body alone
    LG-FedAvg    private       averaged      T steps on both parts together

    client j:  w_j, P_j <- local training from the averaged w and the client's own P_j      Δ_j = w - w_j
    server:    w <- w - η Σ n_j Δ_j / Σ n_j

FedPer: Arivazhagan, Aggarwal, Singh, Choudhary. "Federated Learning with Personalization Layers", 2019,
arXiv 1912.00818. FedRep: Collins, Hassani, Mokhtari, Shakkottai. "Exploiting Shared Representations for Personalized
Federated Learning", ICML 2021, arXiv 2102.07078, Algorithm 1. LG-FedAvg: Liang, Liu, Ziyin, Allen, Auerbach,
Brent, Salakhutdinov, Morency. "Think Locally, Act Globally: Federated Learning with Local and Global Representations",
2020, arXiv 2001.01523.

Wire: 4 s bytes each way, s the weights of the averaged part; a client keeps 4 bytes for each of the others. With all
layers averaged it is FedAvg, to the bit (FedRep: with k = 0). Deviations: updates are weighted by examples, where
LG-FedAvg's code counts every client once; LG-FedAvg's code begins from a model that FedAvg trained, and averages the
best of each client's models. A client that has not trained yet has the base's private part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.partly_private import PartlyPrivate
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder, Trained
from fedferret.models.classifiers import HEAD
from fedferret.models.layers import layers_named


@dataclass(frozen=True, kw_only=True)
class SplitModel(PartlyPrivate):
    """Base of the three: what is head and what is body."""

    has_global_model: ClassVar[bool] = False  # the public values of the private part are never trained
    head_layers: int = 1  # the last layers that are the head: the classifier's linear layer alone, as in FedRep

    def __post_init__(self) -> None:
        if self.head_layers < 0:
            raise UserError(f"head_layers={self.head_layers}: must not be negative; 1 is the classifier's own layer")

    @property
    def objectives(self) -> tuple[str, ...]:
        """The classifier's head is what divides the model; a language model has none."""
        return ("classification",)

    def check(self, model: nn.Module, rounds: int) -> None:
        """There must be so many layers, and something to share."""
        names = list(tree.parameters(model))
        count = len(first_names(names))
        if self.head_layers > count:
            raise UserError(
                f"head_layers={self.head_layers}: of this model {count} layers are tuned; give at most that"
            )
        if not self.shares(names):
            raise UserError(
                f"head_layers={self.head_layers}: of the {count} layers that are tuned {self.name} would share none; "
                f"give another number, tune more than the head, or choose local-only"
            )


@dataclass(frozen=True, kw_only=True)
class FedPer(SplitModel):
    """The body is averaged; the head stays at its client."""

    name: ClassVar[str] = "fedper"

    def shares(self, names: Iterable[str]) -> list[str]:
        """The body."""
        names = list(names)
        head = set(head_of(names, self.head_layers))
        return [name for name in names if name not in head]


@dataclass(frozen=True, kw_only=True)
class FedRep(FedPer):
    """FedPer of clients that train the head first, and then the body."""

    name: ClassVar[str] = "fedrep"
    head_times: int = 10  # k: the head's training is so many times the body's; the paper's ten epochs, then one

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_times < 0:
            raise UserError(f"head_times={self.head_times}: must not be negative; 0 leaves the head as it is")

    def train(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> Trained:
        """Train the head with the body fixed, then the body with the head fixed."""
        body = self.shared(task, public)
        head = [name for name in public.weights if name not in set(body)]
        phases = [(head, self._of_head(), key.fold("head"))] if head and self.head_times else []
        losses, steps, seconds = 0.0, 0, 0.0
        for names, training, of_phase in [*phases, (body, self.training, key)]:
            with training_only(task.model, names):
                trained = training.train(task, data, of_phase)
            count = training.total_steps(len(data))
            losses, steps = losses + count * trained.metrics["loss"], steps + count
            seconds += trained.metrics["seconds"]
        return Trained(tree.parameters(task.model), {"loss": losses / steps, "seconds": seconds})

    def _of_head(self) -> FirstOrder:
        training, times = self.training, self.head_times
        return replace(
            training,
            steps=training.steps and times * training.steps,
            epochs=training.epochs and times * training.epochs,
        )


@dataclass(frozen=True, kw_only=True)
class LGFedAvg(SplitModel):
    """The head is averaged; the body stays at its client."""

    name: ClassVar[str] = "lg-fedavg"

    def shares(self, names: Iterable[str]) -> list[str]:
        """The head."""
        return head_of(list(names), self.head_layers)


def head_of(names: Sequence[str], layers: int) -> list[str]:
    """The weights of a model's head, by name.

    Args:
        names: of all tuned weights, in the model's order.
        layers: the last layers that are the head.

    Returns:
        Names from the first of these layers on, with what follows in no layer, such as a pooler; all names where the
        model has no more layers than that. What stands before the first layer, such as embeddings, is body otherwise.
    """
    firsts = first_names(names)
    if layers >= len(firsts):
        return list(names)
    return list(names[names.index(firsts[-layers]) :]) if layers else []


def first_names(names: Sequence[str]) -> list[str]:
    """The first weight of each layer, a classifier's head among the layers.

    Args:
        names: of all tuned weights, in the model's order.

    Returns:
        One name a layer, in the same order.
    """
    return [each[0] for each in layers_named(names).values()] + [name for name in names if name.startswith(HEAD)][:1]


@contextmanager
def training_only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let no other weights be trained.

    Args:
        model: its other weights require no gradient meanwhile.
        names: of the weights to train.

    Returns:
        A context; after it, whatever happened in it, each weight requires a gradient if it did before.
    """
    chosen = set(names)
    fixed = [each for name, each in model.named_parameters() if each.requires_grad and name not in chosen]
    try:
        for each in fixed:
            each.requires_grad_(False)
        yield
    finally:
        for each in fixed:
            each.requires_grad_(True)
