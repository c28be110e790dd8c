"""What methods that average weights share: the model loaded with weights, a client's update, checks and norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedferret.bases.stochastic_rounding import rounded_once
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import Trained


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


def deltas(before: Mapping[str, Tensor], trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """The update of a client's training: pairs (name, before - after), fp32, one tensor at a time.

    Args:
        before: the weights that training began from.
        trained: the training from them; its weights are unrounded, also of a bf16 model.

    Yields:
        Each name with its update, on the device of the trained weight.

    Raises:
        UpdateRefused: a tensor holds NaN or infinity.
    """
    for name, delta in tree.difference(before, trained.weights):
        # NaN and infinity survive into the sum, which needs no mask of the tensor's size; there, large numbers overflow
        if not math.isfinite(float(delta.sum())) and not delta.isfinite().all():
            raise UpdateRefused(f"the update of {name} holds NaN or infinity: lower the learning rate")
        yield name, delta


def check_finite(norms: Iterable[float], before: Mapping[str, Tensor], trained: Trained) -> None:
    """Look at an update again where its norms are not finite: NaN and infinity survive into them.

    Args:
        norms: of parts of the update, which together are all of it.
        before: the weights that training began from.
        trained: the training from them.

    Raises:
        UpdateRefused: names the tensor.
    """
    if not all(map(math.isfinite, norms)):
        for _ in deltas(before, trained):
            pass


def step_(weights: Mapping[str, Tensor], deltas: Mapping[str, Tensor], rate: float, rounding: Key) -> None:
    """w <- w - rate Δ, in place, element by element; bf16 weights are rounded at random, once.

    Args:
        weights: fp32 or bf16, by name.
        deltas: Δ, fp32, of the same names and shapes, on any device.
        rate: η.
        rounding: of this step; every tensor's key is derived from it by the tensor's name.
    """
    for name, weight in weights.items():
        with rounded_once(weight, rounding.fold(name)) as moved:
            moved.sub_(deltas[name].to(weight.device).view_as(weight) * rate)


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
