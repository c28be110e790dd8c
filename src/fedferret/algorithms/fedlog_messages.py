"""What FedLog keeps and sends, and what sums of features by class can be.

    χ_c = Σ [x, 1] over the client's examples of class c        the last column counts them

Of sums as a client claims them: counts are whole, a class without an example has zeros alone, and where features are
normalised or clamped no sum is longer than its count allows.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.messages import message, state
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.local.feature_statistics import feature_statistics, features_of
from fedferret.models.private_body import FeatureForm

_ROUNDED = 1.001  # sums of fp32 features may be longer by their rounding
_MOST = 2.0**24  # examples that fp32 counts one by one


@state
class FedLogPublic:
    """The head η, fp32, shape (C, m + 1), the bias last."""

    head: Tensor


@state
class FedLogClient:
    """One client's body: its architecture, "" for the recipe's own, and its trainable weights."""

    body: str
    weights: Tree


@state
class FedLogServer:
    """The newest sums of each class, those of rounds in which it had an example; fp32, shape (C, m + 1)."""

    sums: Tensor


@message
class FedLogSums(Payload["FedLogSums"]):
    """χ of one client, fp32, shape (C, m + 1)."""

    sums: Annotated[Tensor, Form(rank=2)]


@message
class FedLogEntry:
    """The round's head η."""

    head: Annotated[Tensor, Form(torch.float32, rank=2)]


def sums_by_class(task: Task, data: Examples, classes: int) -> FedLogSums:
    """Sum a client's features.

    Args:
        task: its model has the client's body.
        data: the client's examples.
        classes: C.

    Returns:
        χ, the constant's column last.

    Raises:
        FeaturesRefused: the client has no example, or a feature is not finite.
    """
    found = feature_statistics(features_of(task, data), classes)
    return FedLogSums(torch.cat((found.sums_CH, found.counts_C[:, None].double()), dim=1).float())


def check_shape(payload: FedLogSums, head_CF: Tensor) -> None:
    """Refuse sums of another shape.

    Args:
        payload: possibly malformed; any data type.
        head_CF: the public head, of the sums' shape.

    Raises:
        ValueError: with one line.
    """
    if not isinstance(payload, FedLogSums) or not isinstance(payload.sums, Tensor):
        raise ValueError(f"a {type(payload).__name__} came where FedLogSums were expected")
    if payload.sums.shape != head_CF.shape:
        raise ValueError(f"sums of shape {tuple(payload.sums.shape)} came: the head's is {tuple(head_CF.shape)}")


def check_sums(payload: FedLogSums, head_CF: Tensor, form: FeatureForm) -> None:
    """Refuse sums that no client's examples can have.

    Args:
        payload: as it came from a client.
        head_CF: the public head.
        form: of the features, which bounds them.

    Raises:
        ValueError: with one line.
    """
    check_shape(payload, head_CF)
    if payload.sums.dtype != torch.float32 or not payload.sums.isfinite().all():
        raise ValueError("the sums of features are not finite fp32 values")
    sums_CM, counts_C = payload.sums[:, :-1].double(), payload.sums[:, -1].double()
    if (counts_C < 0).any() or (counts_C != counts_C.floor()).any() or not 1 <= float(counts_C.sum()) <= _MOST:
        raise ValueError(f"the counts of examples must be whole numbers, at least 1 and at most {_MOST:,.0f} in all")
    if sums_CM[counts_C == 0].any():
        raise ValueError("a class without an example has sums of features")
    bound = form.bound(sums_CM.shape[1])
    too_long = bound is not None and bool((sums_CM.norm(dim=1) > _ROUNDED * bound * counts_C).any())
    if too_long or (form.clamp is not None and (sums_CM.abs() > _ROUNDED * form.clamp * counts_C[:, None]).any()):
        raise ValueError("a sum of features is longer than its number of examples allows")
