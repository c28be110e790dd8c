"""Combine the sums of a round, in client order. Which pool a run has is a recipe's choice, ``[pool]``.

    mean                 m <- m + (w / W)(x - m)                                              one sum in memory
    sum                  floats and integers add up; masked integers modulo their modulus     one sum in memory
    each                 every client's payload, kept apart                                   all in memory
    median               coordinate by coordinate, clients weigh equally                      all in memory
    trimmed-mean         without the trim x n lowest and highest of each coordinate           all in memory
    norm-bounded-mean    the mean of updates scaled down to a bound                           all in memory
    multi-krum           the mean of the n - f updates nearest to their neighbours            all in memory

A running mean does not grow with the number of clients; one client's mean is its sum to the bit, and so is the mean of
two identical ones. Every pool checks a sum before it changes anything. Median and trimmed mean: Yin, Chen, Kannan,
Bartlett, ICML 2018, arXiv 1803.01498. Multi-Krum: Blanchard, El Mhamdi, Guerraoui, Stainer, NeurIPS 2017. Norm bound:
Sun, Kairouz, Suresh, McMahan, 2019, arXiv 1911.07963.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedferret.core.algorithm import Pooled, Pooling
from fedferret.core.exchanges import Masked


class NotFinite(ValueError):
    """A sum or a weight that holds NaN or infinity, or a weight that is not positive."""


class Pool(ABC):
    """Takes sums in client order and returns them combined."""

    def __init__(self) -> None:
        self._weights: list[float] = []
        self._form: list[tuple[str, Any]] | None = None  # of the sums: the first one's

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, sum: Any, weight: float, norm: float | None = None, *, checked: bool = False) -> None:
        """Take one client's sum.

        Args:
            sum: decoded; it stays as it is.
            weight: positive and finite.
            norm: Euclidean, of what the sum alone would add to the weights; for a norm bound.
            checked: whether this pool's ``check`` took the sum before.

        Raises:
            NotFinite: NaN or infinity in the sum or the weight; the pool holds what it held before.
            ValueError: the sum has another form than the first; likewise.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise NotFinite(f"weight {weight}: must be positive and finite")
        if not checked:
            self.check(sum)
        self._take(sum, weight, norm)
        self._weights.append(weight)

    def check(self, sum: Any) -> None:
        """Refuse a sum that could not be added to those that were checked before.

        Args:
            sum: decoded; it may be added later.

        Raises:
            NotFinite: NaN or infinity in the sum.
            ValueError: the sum has another form than the first.
        """
        name = nonfinite(sum)
        if name is not None:
            raise NotFinite(f"{name} holds NaN or infinity")
        if self.alike:
            form = form_of(sum)
            check_same_form(self._form or form, form)
            self._form = form

    def result(self) -> Pooled[Any]:
        """End the round's pooling.

        Returns:
            The combined sum, or every sum where they are kept apart, with the weights in the order of ``add``.
        """
        return Pooled(self._combined(), tuple(self._weights))

    alike = True  # whether all sums must have one form

    @abstractmethod
    def _take(self, sum: Any, weight: float, norm: float | None) -> None: ...

    @abstractmethod
    def _combined(self) -> tuple[Any, ...]: ...


class MeanPool(Pool):
    """The weighted mean, folded in one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._mean: Any = None

    def _take(self, sum: Any, weight: float, norm: float | None) -> None:
        total = math.fsum([*self._weights, weight])
        self._mean = _owned(sum) if self._mean is None else _lerp_(self._mean, sum, weight / total)

    def _combined(self) -> tuple[Any, ...]:
        return () if self._mean is None else (self._mean,)


class SumPool(Pool):
    """The plain sum. Integers add up too, those of ``Masked`` modulo its modulus."""

    def __init__(self) -> None:
        super().__init__()
        self._sum: Any = None

    def _take(self, sum: Any, weight: float, norm: float | None) -> None:
        self._sum = _owned(sum) if self._sum is None else _added(self._sum, sum)

    def _combined(self) -> tuple[Any, ...]:
        return () if self._sum is None else (self._sum,)


class EachPool(Pool):
    """Every client's, kept apart."""

    alike = False  # each client's payload may have its own length

    def __init__(self) -> None:
        super().__init__()
        self._sums: list[Any] = []

    def _take(self, sum: Any, weight: float, norm: float | None) -> None:
        self._sums.append(sum)

    def _combined(self) -> tuple[Any, ...]:
        return tuple(self._sums)


def basic_pool(pooling: Pooling) -> Pool:
    """The pool of a method's own kind.

    Args:
        pooling: how the method's payloads combine.

    Returns:
        A new pool that holds nothing.
    """
    if pooling is Pooling.MEAN:
        return MeanPool()
    return SumPool() if pooling is Pooling.SUM else EachPool()


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a message.

    Args:
        value: a message, or a part of one.
        path: of ``value``, put before every name.

    Yields:
        Pairs of path and tensor, such as ``delta[wte.weight]``, in order of declaration.
    """
    for name, leaf in leaves(value, path):
        if isinstance(leaf, Tensor):
            yield name, leaf


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a message that is no dataclass, mapping or tuple.

    Args:
        value: a message, or a part of one.
        path: of ``value``, put before every name.

    Yields:
        Pairs of path and leaf, in order of declaration.
    """
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from leaves(getattr(value, item.name), _joined(path, item.name))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{path}[{name}]")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def nonfinite(value: Any) -> str | None:
    """Find NaN or infinity in a message.

    Args:
        value: a message, or a part of one.

    Returns:
        The path of the first float or float tensor that holds NaN or infinity, or None.
    """
    for path, leaf in leaves(value):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point() and not within(leaf, math.inf):
                return path
        elif isinstance(leaf, float) and not math.isfinite(leaf):
            return path
    return None


def within(tensor: Tensor, most: float) -> bool:
    """Whether all values are finite and none is larger than ``most``: one pass, without a mask of the tensor's size.

    Args:
        tensor: of floats.
        most: the largest magnitude; infinity asks for finite values alone.

    Returns:
        False where a value is NaN, infinite or too large.
    """
    if not tensor.numel():
        return True
    least, largest = (float(value) for value in torch.aminmax(tensor.detach()))  # NaN comes through
    return -most <= least and largest <= most and math.isfinite(least) and math.isfinite(largest)


def form_of(sum: Any) -> list[tuple[str, Any]]:
    """What must be equal in two sums that pool.

    Args:
        sum: decoded.

    Returns:
        Pairs of path and form, containers before their parts: type and length, or of a leaf its type, shape or fixed
        value.
    """
    return list(_form(sum, ""))


def check_same_form(known: Sequence[tuple[str, Any]], form: Sequence[tuple[str, Any]]) -> None:
    """Refuse a sum of another form than the first.

    Args:
        known: the form of the first sum, from ``form_of``.
        form: of the sum to check.

    Raises:
        ValueError: the forms differ.
    """
    for (path, left), (other, right) in zip(known, form, strict=False):
        if path != other:
            raise ValueError(f"{other or 'a sum'} does not pool with {path or 'the first'}")
        if left != right:
            raise ValueError(f"{path or 'a sum'} ({right}) does not pool with the first client's ({left})")
    if len(known) != len(form):
        raise ValueError(f"a sum of {len(form) - 1} parts does not pool with the first client's, of {len(known) - 1}")


def _form(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The form of a value and of its parts: two values of one form can be mapped together without an error."""
    kind = type(value).__name__
    if dataclasses.is_dataclass(value):
        yield path, kind
        for item in dataclasses.fields(value):
            part = getattr(value, item.name)
            fixed = isinstance(value, Masked) and item.name == "modulus"  # describes, where other integers add up
            yield from [(f"{path}.modulus", f"modulo {part}")] if fixed else _form(part, _joined(path, item.name))
    elif isinstance(value, Mapping):
        yield path, f"a mapping of {len(value)}"
        for name, item in value.items():
            yield from _form(item, f"{path}[{name}]")
    elif isinstance(value, tuple):
        yield path, f"a tuple of {len(value)}"
        for index, item in enumerate(value):
            yield from _form(item, f"{path}[{index}]")
    elif isinstance(value, Tensor):
        yield path, f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    else:
        adds_up = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool))
        yield path, kind if adds_up else value


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def mapped(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """Apply a function to every leaf of a message.

    Args:
        function: takes a leaf of ``value``, and the leaf in the same place of each of ``others``.
        value: a message, or a part of one.
        others: of the form of ``value``.

    Returns:
        A value of the form of ``value`` that holds the function's results.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        parts = {name: mapped(function, getattr(value, name), *(getattr(o, name) for o in others)) for name in names}
        return dataclasses.replace(value, **parts)
    if isinstance(value, Mapping):
        return {name: mapped(function, item, *(o[name] for o in others)) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(mapped(function, *items) for items in zip(value, *others, strict=True))
    return function(value, *others)


def scaled(sum: Any, factor: float) -> Any:
    """Multiply every float and float tensor of a sum.

    Args:
        sum: decoded; it stays as it is.
        factor: any float.

    Returns:
        A new sum; integers, integer tensors and names are the same.
    """

    def leaf(x: Any) -> Any:
        return x * factor if isinstance(x, float) or (isinstance(x, Tensor) and x.is_floating_point()) else x

    return mapped(leaf, sum)


def mean_of(sums: Sequence[Any], weights: Sequence[float]) -> Any:
    """The weighted mean of sums that are all at hand.

    Args:
        sums: at least one, all of one form; they stay as they are.
        weights: one per sum, positive and finite, on any scale.

    Returns:
        A new sum; integers and names are those of the first.
    """
    pool = MeanPool()
    for sum, weight in zip(sums, weights, strict=True):
        pool.add(sum, weight)
    return pool.result().only


def _owned(value: Any) -> Any:
    """A copy that a running mean may overwrite."""
    return mapped(lambda x: x.clone() if isinstance(x, Tensor) else x, value)


def _lerp_(mean: Any, value: Any, share: float) -> Any:
    """``mean + share * (value - mean)``, in place where it is a tensor; integers and names describe and stay."""

    def leaf(x: Any, y: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.lerp_(y, share)
        return x + share * (y - x) if isinstance(x, float) else x

    return mapped(leaf, mean, value)


def _added(total: Any, value: Any) -> Any:
    if isinstance(total, Masked):

        def leaf(x: Any, y: Any) -> Any:
            return (x + y) % total.modulus if isinstance(x, Tensor) else x

        return Masked(mapped(leaf, total.sum, value.sum), total.modulus)
    return mapped(_plus, total, value)


def _plus(x: Any, y: Any) -> Any:
    if isinstance(x, Tensor):
        return x.add_(y)
    return x + y if isinstance(x, int | float) and not isinstance(x, bool) else x
