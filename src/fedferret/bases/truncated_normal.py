"""The paper's basis: K dense columns of N(0, 1) cut to ±1/√d (Ferret, arXiv 2409.06277, section 4.1).

An element is the inverse distribution function of a hashed uniform u: with t = u ∫₀^a exp(-x²/2) dx and a = 1/√d, the
element is the odd power series t + t³/6 + 7 t⁵/120 + ..., evaluated by Horner's rule in fp32. The scale is 1/(K rho),
rho being an element's variance; its closed form cancels (315 times wrong in fp32 at d = 4.2 million), so the series of
its two integrals is used, which has nothing to cancel: rho = (1/3d)(1 - 2/(15 d) + ...).

Deviations from the published code, which scales by d/K (a third) and draws from torch's own generator.

Cost: O(d K): one hash and a short polynomial for each element of V, for each use of it. Tiles of 64 columns by some
thousand positions are built, used and dropped; a column costs about as much as sign buckets do in all. Compiled where
the machine can (native.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fedferret.bases import native
from fedferret.bases.basis import Basis, add_rounded_, fold_rows_
from fedferret.bases.hashing import MAX_UNIFORM_POSITION, column_states, position_states, uniforms
from fedferret.core.keys import Key

_CHUNK = 1 << 17  # elements of V that the plain path holds at a time: they fit a processor's cache
_CHUNK_ELSEWHERE = 1 << 24  # many enough that starting kernels takes no time
_COLUMNS = 64  # part of the definition: V c is summed over groups of this many columns, each group as a fixed tree


@dataclass(frozen=True)
class TruncatedNormal(Basis):
    """Dense columns. ``chunk_elements``: how much of V the plain path holds at a time, if not what suits the device."""

    name: ClassVar[str] = "truncated-normal"
    max_size: ClassVar[int] = MAX_UNIFORM_POSITION

    chunk_elements: int | None = None

    def unbiased_scale(self, size: int, num_coordinates: int) -> float:
        """1/(K rho): the columns are independent and each gives rho Δ in expectation."""
        return 1 / (variance(size) * num_coordinates)

    def error_energy(self, size: int, num_coordinates: int) -> float:
        """(d + κ - 2)/K with κ = fourth over squared second moment of an element, 9/5 but for O(1/d)."""
        return (size + kurtosis(size) - 2) / num_coordinates

    def _project(self, delta_N: Tensor, out_K: Tensor, key: Key, size: int, offset: int) -> None:
        scale = self.unbiased_scale(size, out_K.numel())
        if compiled := native.kernels(delta_N.device):
            out_K += compiled.dense_project(delta_N, out_K.numel(), key, offset, _quantile_coefficients(size)).mul(
                scale
            )
            return
        for start, stop in self._chunks(delta_N, out_K.numel()):
            piece_N = delta_N[start:stop].float()
            positions_N = position_states(key, offset + start, offset + stop, delta_N.device)
            for first in range(0, out_K.numel(), _COLUMNS):
                last = min(first + _COLUMNS, out_K.numel())
                products = elements(column_states(key, first, last, delta_N.device), positions_N, size).mul_(piece_N)
                out_K[first:last] += fold_rows_(products.T).mul(scale)

    def _expand_(self, target_N: Tensor, coordinates_K: Tensor, key: Key, size: int, offset: int) -> None:
        if compiled := native.kernels(target_N.device):
            compiled.dense_expand_(target_N, coordinates_K, key, offset, _quantile_coefficients(size))
            return
        for start, stop in self._chunks(target_N, coordinates_K.numel()):
            positions_N = position_states(key, offset + start, offset + stop, target_N.device)
            increment_N = torch.zeros(stop - start, dtype=torch.float32, device=target_N.device)
            for first in range(0, coordinates_K.numel(), _COLUMNS):
                group_B = coordinates_K[first : first + _COLUMNS]
                columns_B = column_states(key, first, first + group_B.numel(), target_N.device)
                increment_N += fold_rows_(elements(columns_B, positions_N, size).mul_(group_B[:, None]))
            add_rounded_(target_N[start:stop], increment_N)

    def _chunks(self, piece_N: Tensor, num_coordinates: int) -> Iterator[tuple[int, int]]:
        chunk = self.chunk_elements or (_CHUNK if piece_N.device.type == "cpu" else _CHUNK_ELSEWHERE)
        count, step = piece_N.numel(), max(1, chunk // min(num_coordinates, _COLUMNS))
        return ((start, min(count, start + step)) for start in range(0, count, step))


def elements(columns_B: Tensor, positions_N: Tensor, size: int) -> Tensor:
    """Elements of V for hashed column and position states, fp32 (B, N); relative error under 2^-22."""
    first, *rest = _quantile_coefficients(size)
    u = uniforms(columns_B, positions_N)
    if not rest:
        return u.mul_(first)
    square = u * u
    polynomial = torch.full_like(u, rest.pop())
    for coefficient in [*reversed(rest), first]:
        polynomial.mul_(square).add_(coefficient)
    return polynomial.mul_(u)


def variance(size: int) -> float:
    """rho: the variance of N(0, 1) cut to ±1/√size."""
    return _moment(size, 2) / _moment(size, 0)


def kurtosis(size: int) -> float:
    """κ: the fourth moment over the squared second moment of N(0, 1) cut to ±1/√size."""
    return _moment(size, 4) * _moment(size, 0) / _moment(size, 2) ** 2


def _moment(size: int, order: int) -> float:
    """∫ x^order exp(-x²/2) dx over 0 to a = 1/√size, by the alternating series in a² <= 1."""
    bound, power, terms = math.sqrt(1 / size), 1.0, []
    for n in range(20):
        terms.append(power / (2 * n + order + 1))
        power *= -0.5 / size / (n + 1)
    return math.fsum(terms) * math.prod([bound] * (order + 1))


@lru_cache(maxsize=1024)
def _quantile_coefficients(size: int) -> tuple[float, ...]:
    """b_k of x = Σ b_k u^(2k+1), the inverse distribution function at (1 + u)/2, each an fp32 number.

    With c_0 = 1 and c_k = Σ_m c_m c_{k-1-m} / ((m + 1)(2 m + 1)) the coefficient of t^(2k+1) is c_k / ((2k + 1) 2^k).
    Terms that cannot change an fp32 number are left out: one does for 12 million weights, a single weight takes 19.
    """
    # products and sums only, here and in the moments: a power function may round differently on another machine
    bound = _moment(size, 0)  # t at u = 1
    recurrence, coefficients, power = [1.0], [bound], bound
    while True:
        k = len(recurrence)
        recurrence.append(sum(recurrence[m] * recurrence[k - 1 - m] / ((m + 1) * (2 * m + 1)) for m in range(k)))
        power *= bound * bound
        coefficient = recurrence[k] / ((2 * k + 1) * 2**k) * power
        if coefficient < 2.0**-26 * bound:
            return tuple(torch.tensor(coefficients, dtype=torch.float32).tolist())
        coefficients.append(coefficient)
