"""Combine the payloads of a round, one at a time, in client order.

A MEAN is kept as a running mean, ``m <- m + (w / W)(x - m)``: memory does not grow with the number of
clients, one client's mean is its payload to the bit, and so is the mean of two identical ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Generic

import torch
from torch import Tensor

from fedferret.core.algorithm import Pooled, Pooling, Up


class NotFinite(ValueError):
    """A payload or a weight that holds NaN or infinity, or a weight that is not positive."""


class Pool(Generic[Up]):
    """Takes replies in client order and returns them pooled."""

    def __init__(self) -> None:
        self._payloads: list[Any] = []
        self._weights: list[float] = []

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, payload: Up, weight: float) -> None:
        """Fold one client's payload in. Raises NotFinite, and then holds what it held before."""
        if not (math.isfinite(weight) and weight > 0):
            raise NotFinite(f"weight {weight}: must be positive and finite")
        opened = payload.decoded()
        name = nonfinite(opened)
        if name is not None:
            raise NotFinite(f"{name} holds NaN or infinity")
        if payload.pooling is Pooling.EACH or not self._payloads:
            self._payloads.append(opened if payload.pooling is Pooling.EACH else _owned(opened))
        elif payload.pooling is Pooling.SUM:
            self._payloads[0] = _combine(self._payloads[0], opened, None)
        else:
            self._payloads[0] = _combine(self._payloads[0], opened, weight / (sum(self._weights) + weight))
        self._weights.append(weight)

    def result(self) -> Pooled[Up]:
        """What was added, combined."""
        return Pooled(tuple(self._payloads), tuple(self._weights))


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a message, with the path that names it."""
    if isinstance(value, Tensor):
        yield path, value
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from tensors(getattr(value, item.name), f"{path}.{item.name}" if path else item.name)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from tensors(item, f"{path}[{name}]")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")


def nonfinite(value: Any) -> str | None:
    """The path of the first float tensor that holds NaN or infinity, or None."""
    for path, tensor in tensors(value):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return path
    return None


def _owned(value: Any) -> Any:
    """A copy that the running mean may overwrite."""
    return _map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)


def _combine(total: Any, value: Any, share: float | None) -> Any:
    """``total + value`` (share None) or ``total + share * (value - total)``, in place where it is a tensor."""

    def leaf(x: Any, y: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            if x.shape != y.shape:
                raise ValueError(f"payload shapes {tuple(x.shape)} and {tuple(y.shape)} do not pool")
            return x.add_(y) if share is None else x.lerp_(y, share)
        if isinstance(x, float):
            return x + y if share is None else x + share * (y - x)
        return x  # integers and names describe; they do not pool

    return _map(leaf, total, value)


def _map(function: Any, value: Any, *others: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        parts = {name: _map(function, getattr(value, name), *(getattr(o, name) for o in others)) for name in names}
        return dataclasses.replace(value, **parts)
    if isinstance(value, dict):
        return {name: _map(function, item, *(o[name] for o in others)) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_map(function, *items) for items in zip(value, *others, strict=True))
    return function(value, *others)
