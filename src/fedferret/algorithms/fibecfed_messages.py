"""What FibecFed sends and keeps, and the layers that the names of its weights tell of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.partly_private import PrivateWeights
from fedferret.core.algorithm import Payload, Shapes
from fedferret.core.fields import Form
from fedferret.core.messages import message, state
from fedferret.core.tree import Tree
from fedferret.local.curriculum import part_of
from fedferret.local.first_order import TrainingRefused
from fedferret.local.fisher import neuron_masks
from fedferret.models.adapters import FACTOR_A, FACTOR_B
from fedferret.models.layers import layers_named


@state
class FibecFedPublic(FedAvgPublic):
    """All tuned weights, the numbers of the chosen layers (None: not chosen yet), and the seed of the noise."""

    chosen: tuple[int, ...] | None
    noise: int

    @property
    def layers(self) -> dict[str, list[str]]:
        """The names of the tuned weights in each layer that has any."""
        return layers_named(self.weights)


@state
class FibecFedClient(PrivateWeights):
    """One client's weights of layers that do not travel, and what the client has measured on its examples."""

    order: Annotated[Tensor, Form(torch.int32, rank=1)]  # of the examples; empty where all are always used
    fisher: Tree  # F_j by factor, one value per row, fp32
    rows: Tree  # by factor, uint8, 1 for a row that trains
    trained: int = 0  # rounds since the rows were chosen

    def measured(self, scores: Tree, momentum: float, kept: float, order: Tensor) -> FibecFedClient:
        """Take newly measured scores in, and choose the rows.

        Args:
            scores: by factor, one value per row.
            momentum: γ, of the scores of before.
            kept: share of the rows of each factor.
            order: of the examples.

        Returns:
            A new state.
        """
        old = self.fisher
        mixed = {name: momentum * old[name].cpu() + (1 - momentum) * new for name, new in scores.items()}
        return FibecFedClient(self.weights, order, mixed, neuron_masks(mixed, kept))

    def mask(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The rows as a mask for training.

        Args:
            weights: of the model, by name.

        Returns:
            By factor, of the factor's shape; None where every row trains.
        """
        masks = {name: rows.view(-1, 1).expand_as(weights[name]) for name, rows in self.rows.items()}
        return masks or None


@message
class Sensitivities(Payload["Sensitivities"]):
    """A client's I_l as shares of their sum, fp32, one per layer."""

    shares: Tensor

    @classmethod
    def of(cls, changes: Tensor) -> Sensitivities:
        """Divide by the sum.

        Args:
            changes: at least 0, shape (L,).

        Returns:
            Equal shares where all are 0.

        Raises:
            TrainingRefused: a change is NaN or infinite.
        """
        if not changes.isfinite().all():
            raise TrainingRefused("the outputs of the model's layers are not finite")
        changes = changes if changes.any() else torch.ones_like(changes)
        return cls((changes / changes.sum()).float())


@message
class ChosenLayers:
    """Numbers of the layers that are averaged from now on, ascending."""

    layers: Annotated[Tensor, Form(torch.int32, rank=1)]


def check_shares(found: Any, layers: int, values: bool) -> None:
    """Refuse what is no distribution over the layers.

    Args:
        found: of any type.
        layers: how many there are.
        values: False where a mask is on the values.

    Raises:
        ValueError: it is not ``Sensitivities`` of these layers.
    """
    shares = found.shares if isinstance(found, Sensitivities) else None
    if not isinstance(shares, Tensor) or shares.shape != (layers,):
        raise ValueError(f"a {type(found).__name__} came where the sensitivities of {layers} layers were expected")
    fits = shares.dtype == torch.float32 and bool((shares >= 0).all()) and abs(float(shares.sum()) - 1) < 1e-3
    if values and not fits:
        raise ValueError("the layers' shares are not fp32 numbers of at least 0 that add up to 1")


def sent_values(shapes: Shapes, share: float) -> tuple[int, int, int, int]:
    """How much travels of the tuned weights; layers may differ in size.

    Args:
        shapes: of all tuned weights, by name.
        share: of the layers that is chosen.

    Returns:
        How many layers there are; the least and the most values that a choice of layers makes travel; all values.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    layers = sorted(sum(sizes[name] for name in names) for names in layers_named(shapes).values())
    chosen, total = (part_of(len(layers), share) if layers else 0), sum(sizes.values())
    return len(layers), total - sum(layers[chosen:]), total - sum(layers[: len(layers) - chosen]), total


def factors_of(names: Iterable[str]) -> list[str]:
    """Select LoRA's factors.

    Args:
        names: of tuned weights.

    Returns:
        Those of A and B, in order; magnitudes and dense weights are left out.
    """
    return [name for name in names if name.endswith((FACTOR_A, FACTOR_B))]
