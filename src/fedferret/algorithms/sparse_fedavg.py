"""FedAvg of a share of the weights: the first stage of SLoRA (``slora.py``).

    mask:      ``density`` of every tuned matrix, drawn by the run's key: public randomness, so only values travel
    client j:  T local steps at the mask; gradient, decay and moments are gated, and all else stays as it is to the bit
    server:    the mean of the updates at the mask            everybody: w <- w - η Δ at the mask

Wire: 4 Σ round(density · rows · columns) bytes up and down, and 4 a weight of a classifier's head, which is dense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import Delta, FedAvg, FedAvgEntry, FedAvgPublic
from fedferret.algorithms.full_model import deltas, loaded
from fedferret.bases.masks import drawn_positions, num_drawn
from fedferret.core.algorithm import ClientReply, Shapes, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import state
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import Trained
from fedferret.models.adapters.modules import chosen_modules
from fedferret.models.classifiers import HEAD, Classifier

Masks: TypeAlias = Literal["fixed", "per-round"]


@state
class SparsePublic(FedAvgPublic):
    """The tuned matrices, whole, a classifier's head, and what draws the masks."""

    key: int


@dataclass(frozen=True, kw_only=True)
class SparseFedAvg(FedAvg):
    """The weighted mean of the clients' updates at a mask."""

    name: ClassVar[str] = "sparse-fedavg"
    holds_bf16: ClassVar[bool] = False
    density: float = 0.01  # SLoRA's abstract
    mask: Masks = "fixed"
    modules: str | tuple[str, ...] | None = None  # with weights to tune, as in FedIT

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UserError(f"density={self.density}: must be above 0 and at most 1, which tunes the matrices whole")

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """Freeze all but the matrices and a classifier's head."""
        names = {f"{name}.weight" for name in chosen_modules(model, self.modules)}
        for name, weight in model.named_parameters():
            if name in names and not weight.requires_grad:
                raise UserError(f"{name} is frozen, and a first stage tunes it: leave model.train out")
            weight.requires_grad_(name in names or (isinstance(model, Classifier) and is_dense(name)))
        return model

    def values(self, shapes: Shapes) -> int:
        """How many values a payload has.

        Args:
            shapes: of the tuned tensors, by name.

        Returns:
            Those at the masks and those of a head.
        """
        return sum(self._length(name, math.prod(shape)) for name, shape in shapes.items())

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes a value, both ways."""
        return WireCost.exact(4 * self.values(shapes), 4 * self.values(shapes))

    def sum_values(self, shapes: Shapes, round: int) -> int:
        """Those of a payload."""
        return self.values(shapes)

    def init(self, task: Task, key: Key) -> tuple[SparsePublic, None]:
        """The base's matrices."""
        public, _ = super().init(task, key)
        return SparsePublic(public.weights, key.fold("mask").value), None

    def client_update(
        self, task: Task, public: FedAvgPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Delta]:
        """Train at the mask; send the update's values there."""
        places, sent = self._places(task, public), {}
        with loaded(task, public.weights):
            trained = self.train(task, public, data, key.fold("train"))
            for name, delta in deltas(public.weights, trained):
                sent[name] = delta if name not in places else _at(delta.view(-1), places[name])
        return ClientReply(Delta(sent), None, trained.metrics)

    def train(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> Trained:
        """Local steps that leave all else as it is; at density 1 FedAvg's."""
        masks = {}
        for name, places in self._places(task, public).items() if self.density < 1 else ():
            masks[name] = torch.zeros(public.weights[name].numel(), dtype=torch.bool)
            masks[name][places] = True
            masks[name] = masks[name].view(public.weights[name].shape)
        return self.training.train(task, data, key, mask=masks or None)

    def apply(self, task: Task, public: FedAvgPublic, entry: FedAvgEntry) -> None:
        """w <- w - η Δ at the mask, element by element."""
        places = self._places(task, public)
        for name, weight in public.weights.items():
            step = entry.delta[name].to(weight.device) * entry.learning_rate
            if name in places:
                where = places[name].to(weight.device)
                weight.view(-1)[where] = weight.view(-1)[where] - step
            else:
                weight.sub_(step)

    def _length(self, name: str, size: int) -> int:
        return size if is_dense(name) else num_drawn(size, self.density)

    def _sent(self, task: Task, public: FedAvgPublic) -> dict[str, Tensor]:
        """The values at the masks, and a head."""
        return {
            name: weight if is_dense(name) else torch.empty(self._length(name, weight.numel()), device="meta")
            for name, weight in public.weights.items()
        }

    def _places(self, task: Task, public: FedAvgPublic) -> Mapping[str, Tensor]:
        """The mask of the round at hand: flat positions, by matrix."""
        assert isinstance(public, SparsePublic)
        key = Key(public.key).fold(task.round) if self.mask == "per-round" else Key(public.key)
        sizes = ((name, weight.numel()) for name, weight in public.weights.items() if not is_dense(name))
        return _drawn(key, tuple(sizes), self.density)


def is_dense(name: str) -> bool:
    """Whether a tuned tensor is tuned whole.

    Args:
        name: of the tensor.

    Returns:
        True for the weights of a classifier's head.
    """
    return name.startswith(HEAD)


@lru_cache(maxsize=1)  # all clients of a round have the same
def _drawn(key: Key, sizes: tuple[tuple[str, int], ...], density: float) -> Mapping[str, Tensor]:
    return {name: drawn_positions(size, density, key.fold(name)) for name, size in sizes}


def _at(flat: Tensor, places: Tensor) -> Tensor:
    return flat[places.to(flat.device)]
