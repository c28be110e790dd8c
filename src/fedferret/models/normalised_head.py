"""A classifier with a head that reads normalised features.

    "l2"           x / ‖x‖                                   on the unit sphere
    "layer-norm"   (x - mean(x)) / std(x), over the H values  of norm √H

No folder of a plain architecture has a place for the normalisation, so such a model cannot be exported as one.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from fedferret.models.classifiers import Classifier

Normalise = Literal["none", "l2", "layer-norm"]


def normalised(x_NH: Tensor, kind: Normalise) -> Tensor:
    """Normalise features, example by example.

    Args:
        x_NH: features.
        kind: "none" gives them back.

    Returns:
        Shape (N, H).
    """
    if kind == "l2":
        return functional.normalize(x_NH, dim=1)
    return functional.layer_norm(x_NH, x_NH.shape[1:]) if kind == "layer-norm" else x_NH


def reach(kind: Normalise, width: int) -> float | None:
    """The largest norm of normalised features.

    Args:
        kind: of the normalisation.
        width: H.

    Returns:
        The norm; None where there is no bound.
    """
    bounds: dict[Normalise, float | None] = {"none": None, "l2": 1.0, "layer-norm": math.sqrt(width)}
    return bounds[kind]


def normalise_(model: Classifier, kind: Normalise) -> None:
    """Let the head of a classifier read normalised features.

    Args:
        model: changed in place.
        kind: "none" changes nothing.
    """

    def before(head: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (normalised(given[0], kind),)

    if kind != "none":
        model.head.register_forward_pre_hook(before)
