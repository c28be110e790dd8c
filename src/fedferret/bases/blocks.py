"""Blocks: which tensors share a basis, how many of the K coordinates each block gets, and norms in eight bits.

``pack`` is the paper's rule (Ferret, arXiv 2409.06277, section 4.2): consecutive tensors share a block while together
they hold at most 0.9 times the median tensor's weights. A larger tensor is a block alone.

``allocate`` gives block l about K_l ∝ weight_l coordinates, between 1 and d_l, and their sum is exactly K. It finds the
clipped shares by water-filling: K(λ) = Σ clip(λ weight_l, 1, d_l) rises piecewise linearly, so a sweep over its 2 L
corners finds the λ with K(λ) = K. The largest fractional parts are rounded up. Shares are exact fractions and ties go
to the earlier block, so every node that knows the norms computes the same allocation. Cost: O(L log L).
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fedferret.core.errors import UserError, nearest

_RULES = ("norm", "norm-sqrt-dim", "norm-squared", "uniform")

_STEPS_PER_OCTAVE = 4
_CODE_OF_ONE = 161  # code of norm 1: code 1 is then 2^-40 and code 255 is 2^23.5
_QUARTER_OCTAVES = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
# the mantissas in [1, 2) at which the logarithm rounds up: 2^(1/8), 2^(3/8), 2^(5/8), 2^(7/8)
_ROUNDING_POINTS = (1.0905077326652577, 1.2968395546510096, 1.5422108254079407, 1.8340080864093424)


@dataclass(frozen=True)
class Block:
    """Consecutive tensors that share one basis and one share of the coordinates, in the order of ``names``."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """d_l: the number of weights."""
        return sum(self.sizes)


def pack(sizes: Mapping[str, int]) -> tuple[Block, ...]:
    """Pack tensors into blocks by the paper's rule (Ferret, section 4.2).

    Args:
        sizes: number of weights per tensor, in the model's order.

    Returns:
        The blocks in the model's order; every tensor is in one of them.
    """
    if not sizes:
        return ()
    limit = 0.9 * statistics.median(sizes.values())
    blocks: list[Block] = []
    for name, size in sizes.items():
        if blocks and blocks[-1].size + size <= limit:
            blocks[-1] = Block((*blocks[-1].names, name), (*blocks[-1].sizes, size))
        else:
            blocks.append(Block((name,), (size,)))
    return tuple(blocks)


def allocate(rule: str, sizes: Sequence[int], norms: Sequence[float], total: int) -> tuple[int, ...]:
    """Share ``total`` coordinates among the blocks.

    A zero-norm block gets one coordinate. Where the other blocks cannot hold the rest (for example when all norms are
    zero), the rest is shared among the zero-norm blocks as if their norms were 1.

    Args:
        rule: what K_l is proportional to: "norm" (the paper's experiments) ‖Δ_l‖; "norm-sqrt-dim" (the lowest total
            error energy) ‖Δ_l‖√d_l; "norm-squared" (equal error energy in every weight) ‖Δ_l‖²; "uniform" 1.
        sizes: d_l, number of weights per block, length L.
        norms: ‖Δ_l‖ per block, length L.
        total: K, from L to the sum of ``sizes``.

    Returns:
        K_l per block, length L: between 1 and d_l, and the sum is exactly ``total``.

    Raises:
        UserError: for an unknown rule, a total outside L to d, or a norm that is negative, infinite or NaN.
    """
    if rule not in _RULES:
        raise UserError(f'there is no allocation rule "{rule}": {nearest(rule, _RULES)}')
    if not len(sizes) <= total <= sum(sizes):
        raise UserError(
            f"{total:,} coordinates cannot be shared among {len(sizes):,} blocks of {sum(sizes):,} weights: "
            f"give {len(sizes):,} to {sum(sizes):,}"
        )
    for index, norm in enumerate(norms):
        if not (math.isfinite(norm) and norm >= 0):
            raise UserError(f"the norm of block {index} is {norm}: norms must be finite and not negative")
    weights = [_weight(rule, size, norm) for size, norm in zip(sizes, norms, strict=True)]
    zero_norm = [index for index, weight in enumerate(weights) if weight == 0]
    capacity = sum(size for size, weight in zip(sizes, weights, strict=True) if weight)
    if total - len(zero_norm) <= capacity:
        return _round_to_sum(_fill(sizes, weights, total), total)
    shares = [Fraction(size) for size in sizes]
    zero_norm_sizes = [sizes[index] for index in zero_norm]
    zero_norm_weights = [_weight(rule, size, 1.0) for size in zero_norm_sizes]
    for index, share in zip(zero_norm, _fill(zero_norm_sizes, zero_norm_weights, total - capacity), strict=True):
        shares[index] = share
    return _round_to_sum(shares, total)


def encode_norms(norms: Sequence[float]) -> Tensor:
    """Norms in eight bits each: code 0 for zero, else the code c of the nearest 2^((c - 161)/4), 9.1e-13 to 1.2e7.

    The relative error within that range is at most 2^(1/8) - 1, 9.1%. Norms outside it get the code of the nearest end.

    Args:
        norms: ‖Δ_l‖ per block, length L.

    Returns:
        Codes, uint8, shape (L,).

    Raises:
        UserError: for a norm that is negative, infinite or NaN.
    """
    for index, norm in enumerate(norms):
        if not (math.isfinite(norm) and norm >= 0):
            raise UserError(f"the norm of block {index} is {norm}: norms must be finite and not negative")
    return torch.tensor([_encode_norm(norm) for norm in norms], dtype=torch.uint8)


def decode_norms(codes_L: Tensor) -> list[float]:
    """Decode what ``encode_norms`` returned.

    Args:
        codes_L: uint8, shape (L,).

    Returns:
        Norms, length L: four constants times powers of two, the same floats on every node.
    """
    return [_decode_norm(code) for code in codes_L.tolist()]


def _weight(rule: str, size: int, norm: float) -> Fraction:
    """What the block's K_l is proportional to."""
    if rule == "uniform":
        return Fraction(1)
    # sqrt and one product, which IEEE 754 rounds the same on every machine; what follows is exact
    factor = {"norm": 1.0, "norm-sqrt-dim": math.sqrt(size), "norm-squared": norm}[rule]
    return Fraction(norm * factor)


def _fill(sizes: Sequence[int], weights: Sequence[Fraction], total: int) -> list[Fraction]:
    """Shares clip(λ weight, 1, size) with the λ at which they sum to ``total``; blocks of positive weight have room."""
    # a share rises from 1 at level 1/weight and stops at size/weight
    corners = [(1 / weight, weight, -1) for weight in weights if weight]
    corners += [(size / weight, -weight, size) for size, weight in zip(sizes, weights, strict=True) if weight]
    slope, constant, level = Fraction(0), len(sizes), Fraction(0)
    for level, slope_change, constant_change in sorted(corners):
        if constant + slope * level >= total:
            break
        slope += slope_change
        constant += constant_change
    if slope:
        level = (total - constant) / slope
    return [min(max(level * weight, Fraction(1)), Fraction(size)) for size, weight in zip(sizes, weights, strict=True)]


def _round_to_sum(shares: Sequence[Fraction], total: int) -> tuple[int, ...]:
    """The ``shares``, which sum to ``total``, as integers of that sum: the largest fractional parts are rounded up."""
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: (counts[index] - shares[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def _encode_norm(norm: float) -> int:
    if norm == 0:
        return 0
    mantissa, exponent = math.frexp(norm)  # mantissa in [0.5, 1)
    quarter = bisect_right(_ROUNDING_POINTS, 2 * mantissa)
    return min(max(_CODE_OF_ONE + _STEPS_PER_OCTAVE * (exponent - 1) + quarter, 1), 255)


def _decode_norm(code: int) -> float:
    octave, quarter = divmod(code - _CODE_OF_ONE, _STEPS_PER_OCTAVE)
    return math.ldexp(_QUARTER_OCTAVES[quarter], octave) if code else 0.0
