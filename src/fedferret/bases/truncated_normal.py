"""The paper's basis: K dense columns of N(0, 1) truncated to ±1/√d (Ferret, arXiv 2409.06277, section 4.1).

An element is the inverse distribution function of a hashed uniform u: with t = u ∫₀^a exp(-x²/2) dx and a = 1/√d, the
element is the odd power series t + t³/6 + 7 t⁵/120 + ..., evaluated by Horner's rule in fp32. The scale is 1/(K rho)
with rho the variance of an element. The closed form of rho suffers from cancellation (315 times wrong in fp32 at d =
4.2 million), so rho is computed from the series of its two integrals, which does not: rho = (1/3d)(1 - 2/(15 d) + ...).

Deviations from the published code: it scales by d/K (a third of 1/(K rho)) and draws from torch's generator.

Cost: O(d K): one hash and a short polynomial per element of V and use. Tiles of 64 columns by some thousand positions
are built, used and dropped. One column costs about as much as a whole projection with sign buckets. Compiled where
there is a C compiler (native.py).
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
from fedferret.bases.arithmetic import add_rounded_, fold_rows_
from fedferret.bases.basis import Basis
from fedferret.bases.hashing import MAX_UNIFORM_POSITION, column_states, position_states, uniforms
from fedferret.core.keys import Key

_CHUNK = 1 << 17  # elements of V per chunk of the PyTorch fallback: they fit in a processor's cache
_CHUNK_ACCELERATOR = 1 << 24  # so many that the time to launch kernels is negligible
_COLUMNS = 64  # part of the definition: V c is summed over groups of this many columns, each group by a fixed tree


@dataclass(frozen=True)
class TruncatedNormal(Basis):
    """Dense columns of truncated normal elements."""

    name: ClassVar[str] = "truncated-normal"
    max_size: ClassVar[int] = MAX_UNIFORM_POSITION

    chunk_elements: int | None = None  # of V, per chunk of the PyTorch fallback; None: chosen by device

    def unbiased_scale(self, size: int, num_coordinates: int) -> float:
        """1/(K rho): the columns are independent and each gives rho Δ in expectation.

        Args:
            size: d, number of weights of the block.
            num_coordinates: K.
        """
        return 1 / (variance(size) * num_coordinates)

    def error_energy(self, size: int, num_coordinates: int) -> float:
        """(d + κ - 2)/K with κ the fourth moment of an element over its squared second moment, 9/5 + O(1/d).

        Args:
            size: d, number of weights of the block.
            num_coordinates: K.
        """
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
        """(start, stop) of the piece's chunks of positions."""
        chunk = self.chunk_elements or (_CHUNK if piece_N.device.type == "cpu" else _CHUNK_ACCELERATOR)
        count, step = piece_N.numel(), max(1, chunk // min(num_coordinates, _COLUMNS))
        return ((start, min(count, start + step)) for start in range(0, count, step))


def elements(columns_B: Tensor, positions_N: Tensor, size: int) -> Tensor:
    """Elements of V; relative error under 2^-22.

    Args:
        columns_B: ``column_states``, int32, shape (B,).
        positions_N: ``position_states``, int32, shape (N,).
        size: d, number of weights of the block.
    Returns:
        fp32, shape (B, N).
    """
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
    """rho: the variance of N(0, 1) truncated to ±1/√size."""
    return _moment(size, 2) / _moment(size, 0)


def kurtosis(size: int) -> float:
    """κ: the fourth moment over the squared second moment of N(0, 1) truncated to ±1/√size."""
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
    """b_k of x = Σ b_k u^(2k+1), the inverse distribution function at (1 + u)/2, each an fp32 value.

    With c_0 = 1 and c_k = Σ_m c_m c_{k-1-m} / ((m + 1)(2 m + 1)) the coefficient of t^(2k+1) is c_k / ((2k + 1) 2^k).
    Terms too small to change an fp32 value are omitted: blocks of 12 million weights need one term, a single weight 19.
    """
    # only products and sums, here and in the moments: a power function may round differently on another machine
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
