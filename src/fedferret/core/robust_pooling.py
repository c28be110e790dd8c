"""Pools that a minority of clients cannot move far: coordinate-wise median, trimmed mean, norm bound, multi-Krum.

``core/pooling.py`` says which is which and where each is from. All but a mean with a fixed norm bound hold every
client's sum in memory until the round ends.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fedferret.core.algorithm import Pooling
from fedferret.core.errors import UserError
from fedferret.core.pooling import EachPool, MeanPool, Pool, basic_pool, mapped, mean_of, scaled, tensors

PoolName: TypeAlias = Literal["mean", "median", "trimmed-mean", "norm-bounded-mean", "multi-krum"]


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """How the clients' sums combine."""

    name: PoolName = "mean"  # the methods' own: a mean, or a plain sum, or each kept apart
    trim_fraction: float = 0.1  # of the clients, cut off at either end of every coordinate by "trimmed-mean"
    krum_fraction: float = 0.2  # of the clients that "multi-krum" takes for hostile
    norm_bound: float | None = None  # of an update, by "norm-bounded-mean"; None: the cohort's median norm
    norm_limit: Literal["on", "off"] = "on"  # refuses updates with a norm above that of the model, or of most others
    norm_ratio: float = 10.0  # times the cohort's median norm that an update may have, from four updates on

    def __post_init__(self) -> None:
        if not 0 <= self.trim_fraction < 0.5:
            raise UserError(
                f"trim_fraction={self.trim_fraction}: leaves no client; give a fraction from 0 to below 0.5"
            )
        if not 0 <= self.krum_fraction < 0.5:
            raise UserError(
                f"krum_fraction={self.krum_fraction}: leaves no majority; give a fraction from 0 to below 0.5"
            )
        if self.norm_bound is not None and not 0 < self.norm_bound < math.inf:
            raise UserError(f"norm_bound={self.norm_bound}: must be greater than 0 and finite")
        if not 1 <= self.norm_ratio < math.inf:
            raise UserError(f"norm_ratio={self.norm_ratio}: must be at least 1 and finite")

    def check(self, pooling: Pooling, method: str, cohort: int) -> None:
        """Refuse a pool that a method's payloads or a round's number of clients do not allow.

        Args:
            pooling: the method's own.
            method: its name, for the message.
            cohort: clients in a round.

        Raises:
            UserError: the method's payloads are not averaged, or the cohort is too small for this pool.
        """
        if self.name == "mean":
            return
        if pooling is not Pooling.MEAN:
            raise UserError(
                f'pool.name="{self.name}": the payloads of {method} are not averaged (they are pooled as '
                f'"{pooling.value}"), set pool.name="mean" or a setting of the method with which they are'
            )
        hostile = math.floor(self.krum_fraction * cohort)
        few = 3 if self.name == "trimmed-mean" else 5  # the least clients of whom one can be left out
        least = math.ceil(1000 / cohort) / 1000  # the fraction that is one client
        remedy = f"sample {few} or more" if cohort < few else f"set it to at least {least} or sample more clients"
        if self.name == "median" and cohort < 3:
            raise UserError(
                f'pool.name="median": of {cohort} clients a median is their mean, set clients.per_round to 3 or more'
            )
        if self.name == "trimmed-mean" and not math.floor(self.trim_fraction * cohort):
            raise UserError(
                f"pool.trim_fraction={self.trim_fraction}: of {cohort} clients it cuts off nobody, {remedy}"
            )
        if self.name == "multi-krum" and not hostile:
            raise UserError(
                f"pool.krum_fraction={self.krum_fraction}: of {cohort} clients it takes nobody for hostile, {remedy}"
            )
        if self.name == "multi-krum" and cohort < 2 * hostile + 3:
            raise UserError(
                f"pool.krum_fraction={self.krum_fraction}: with {hostile} hostile clients multi-krum needs "
                f"{2 * hostile + 3} in a round, and clients.per_round is {cohort}"
            )

    def pool(self, pooling: Pooling) -> Pool:
        """A new pool for one round.

        Args:
            pooling: the method's own; it decides the pool where ``name`` is "mean".

        Returns:
            A pool that holds nothing.
        """
        if self.name == "median":
            return MedianPool()
        if self.name == "trimmed-mean":
            return TrimmedMeanPool(self.trim_fraction)
        if self.name == "multi-krum":
            return MultiKrumPool(self.krum_fraction)
        if self.name == "norm-bounded-mean":
            return NormBoundedPool() if self.norm_bound is None else FixedBoundPool(self.norm_bound)
        return basic_pool(pooling)


class HoldingPool(EachPool):
    """Keeps every sum until the round ends; subclasses combine them into one."""

    alike = True


class MedianPool(HoldingPool):
    """The coordinate-wise median; of an even number the mean of the middle two. Clients weigh equally."""

    def _combined(self) -> tuple[Any, ...]:
        return (mapped(_median, *self._sums),)


class TrimmedMeanPool(HoldingPool):
    """The coordinate-wise mean without the lowest and highest floor(fraction x n). Clients weigh equally."""

    def __init__(self, fraction: float) -> None:
        """Hold nothing yet.

        Args:
            fraction: left out at either end of each coordinate, in [0, 0.5).
        """
        super().__init__()
        self._fraction = fraction

    def _combined(self) -> tuple[Any, ...]:
        cut = math.floor(self._fraction * len(self._sums))

        def trimmed(*values: Any) -> Any:
            if isinstance(values[0], Tensor) and values[0].is_floating_point():
                ordered = torch.stack(values).sort(dim=0).values
                return ordered[cut : len(values) - cut].mean(dim=0)
            if isinstance(values[0], float):
                return statistics.fmean(sorted(values)[cut : len(values) - cut])
            return values[0]

        return (mapped(trimmed, *self._sums),)


class NormBoundedPool(HoldingPool):
    """The weighted mean of updates scaled down to the cohort's median norm."""

    def __init__(self) -> None:
        super().__init__()
        self._norms: list[float] = []

    def _take(self, sum: Any, weight: float, norm: float | None) -> None:
        self._norms.append(_norm_of(sum, norm))
        super()._take(sum, weight, norm)

    def _combined(self) -> tuple[Any, ...]:
        bound = statistics.median(self._norms)
        pairs = zip(self._sums, self._norms, strict=True)
        return (mean_of([_bounded(sum, norm, bound) for sum, norm in pairs], self._weights),)


class FixedBoundPool(MeanPool):
    """The weighted mean of updates scaled down to a given norm, one at a time."""

    def __init__(self, bound: float) -> None:
        """Hold nothing yet.

        Args:
            bound: Euclidean norm, positive, of what an update would do to the weights.
        """
        super().__init__()
        self._bound = bound

    def _take(self, sum: Any, weight: float, norm: float | None) -> None:
        super()._take(_bounded(sum, _norm_of(sum, norm), self._bound), weight, norm)


class MultiKrumPool(HoldingPool):
    """The plain mean of the n - f sums with the smallest squared distances to their n - f - 2 nearest neighbours."""

    def __init__(self, fraction: float) -> None:
        """Hold nothing yet.

        Args:
            fraction: of the clients, taken for hostile: f = floor(fraction x n).
        """
        super().__init__()
        self._fraction = fraction

    def _combined(self) -> tuple[Any, ...]:
        count = len(self._sums)
        hostile = math.floor(self._fraction * count)
        near = max(1, count - hostile - 2)
        scores = [
            math.fsum(sorted(_squared_distance(one, other) for other in self._sums if other is not one)[:near])
            for one in self._sums
        ]
        chosen = sorted(sorted(range(count), key=lambda place: (scores[place], place))[: count - hostile])
        return (mean_of([self._sums[place] for place in chosen], [1.0] * len(chosen)),)


def _median(*values: Any) -> Any:
    if isinstance(values[0], Tensor) and values[0].is_floating_point():
        ordered, half = torch.stack(values).sort(dim=0).values, len(values) // 2
        return ordered[half].clone() if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return statistics.median(values) if isinstance(values[0], float) else values[0]


def _norm_of(sum: Any, norm: float | None) -> float:
    """The norm of the update, or of the sum's values where the update's has no meaning."""
    if norm is not None:
        return norm
    floats = [tensor.double() for _, tensor in tensors(sum) if tensor.is_floating_point()]
    return math.sqrt(math.fsum(float(tensor.square().sum()) for tensor in floats))


def _bounded(sum: Any, norm: float, bound: float) -> Any:
    return scaled(sum, bound / norm) if norm > bound else sum


def _squared_distance(one: Any, other: Any) -> float:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return math.fsum(
        float((a.double() - b.double()).square().sum()) for (_, a), (_, b) in pairs if a.is_floating_point()
    )
