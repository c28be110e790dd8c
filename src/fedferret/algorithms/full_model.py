"""What methods that average weights share: the model loaded with weights, a client's update, checks and norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedferret.core import tree
from fedferret.core.task import Task


class UpdateRefused(RuntimeError):
    """A client's update that holds NaN or infinity; names the tensor."""


@contextmanager
def loaded(task: Task, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The task's model with these weights in it.

    Args:
        task: its working model is overwritten.
        weights: by the model's names, of any types and devices.

    Returns:
        A context that gives the model; nothing is put back after it.
    """
    tree.copy_(tree.parameters(task.model), weights)
    yield task.model


def deltas(before: Mapping[str, Tensor], after: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The update of a client's training: pairs (name, before - after), fp32, one tensor at a time.

    Args:
        before: the weights that training began from.
        after: the trained model.

    Yields:
        Each name with its update, on the device of the trained weight.

    Raises:
        UpdateRefused: a tensor holds NaN or infinity.
    """
    for name, delta in tree.difference(before, tree.parameters(after)):
        # NaN and infinity survive into the sum, which needs no mask of the tensor's size; there, large numbers overflow
        if not math.isfinite(float(delta.sum())) and not delta.isfinite().all():
            raise UpdateRefused(f"the update of {name} holds NaN or infinity: lower the learning rate")
        yield name, delta


def check_finite(norms: Iterable[float], before: Mapping[str, Tensor], after: nn.Module) -> None:
    """Look at an update again where its norms are not finite: NaN and infinity survive into them.

    Args:
        norms: of parts of the update, which together are all of it.
        before: the weights that training began from.
        after: the trained model.

    Raises:
        UpdateRefused: names the tensor.
    """
    if not all(map(math.isfinite, norms)):
        for _ in deltas(before, after):
            pass


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Refuse, with a ValueError, tensors of other names, order, shapes or data types than a model's.

    Args:
        expected: of the model.
        found: that a client sent.
        dtype: None where any is right.
    """
    wanted = [(name, tuple(weight.shape)) for name, weight in expected.items()]
    came = [(name, tuple(tensor.shape)) for name, tensor in found.items()]
    kinds = {tensor.dtype for tensor in found.values()}
    if came != wanted or (dtype is not None and kinds != {dtype}):
        raise ValueError("the update's tensors are not the model's: another model or version sent it")
