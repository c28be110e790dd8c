"""The best approximation of a matrix by one of a lower rank, as two factors: W ≈ s B A.

    W = Σ_j S_j u_j v_jᵀ, S falling       of rank r nearest to W: the first r terms, at a distance of √(Σ_{j>r} S_j²)
    "b"           B = U_r diag(S_r) / s         A = V_rᵀ
    "balanced"    B = U_r diag(√(S_r / s))      A = diag(√(S_r / s)) V_rᵀ

Eckart and Young, Psychometrika 1936. Computed in float64 on the CPU. The last bits depend on the machine's LAPACK and
its number of threads, so one node computes factors, and others are sent them. Where S_j is 0, A has a row as LoRA's A
begins with and B a column of zeros: with both zero, neither would ever get a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedferret.core.keys import Key

Split: TypeAlias = Literal["b", "balanced"]


@dataclass(frozen=True)
class LowRank:
    """Two factors of an approximation.

    Attributes:
        a: shape (r, inputs), fp32.
        b: shape (outputs, r), fp32.
        retained: the approximation's energy, Σ_{j<=r} S_j².
        energy: the matrix's, Σ_j S_j².
    """

    a: Tensor
    b: Tensor
    retained: float
    energy: float


def of_matrix(matrix: Tensor, rank: int, scale: float, split: Split, key: Key) -> LowRank:
    """Approximate a matrix.

    Args:
        matrix: shape (outputs, inputs), any float type and device.
        rank: r.
        scale: s of the product s B A.
        split: which factor holds the singular values.
        key: draws rows of A where singular values are 0.

    Returns:
        The factors.
    """
    u, singular, v = torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False)
    return _split(u, singular, v, rank, scale, split, key)


def of_product(a: Tensor, b: Tensor, before: float, scale: float, rank: int, split: Split, key: Key) -> LowRank:
    """Approximate a product of factors, without the product itself.

    Args:
        a: shape (R, inputs).
        b: shape (outputs, R).
        before: the product is ``before`` B A.
        scale: s of the new product s B A.
        rank: r, at most R.
        split: as in ``of_matrix``.
        key: as in ``of_matrix``.

    Returns:
        The factors.
    """
    left, upper = torch.linalg.qr(b.detach().cpu().double() * before)
    right, lower = torch.linalg.qr(a.detach().cpu().double().T)
    u, singular, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return _split(left @ u, singular, v @ right.T, rank, scale, split, key)


def _split(u: Tensor, singular: Tensor, v: Tensor, rank: int, scale: float, split: Split, key: Key) -> LowRank:
    energies, inputs = singular.square(), v.shape[1]
    if (missing := rank - len(singular)) > 0:  # of a gate of one output, say: the other terms are 0
        u, singular, v = (pad(each, (0, missing)) for each in (u, singular, v.T))
        v = v.T
    rounding = max(u.shape[0], inputs) * torch.finfo(torch.float64).eps * singular[0]
    kept = torch.where(singular > rounding, singular, 0.0)[:rank] / scale
    on_a = kept.sqrt() if split == "balanced" else torch.ones_like(kept)
    b = u[:, :rank] * torch.where(kept > 0, kept / on_a, 0.0)
    a = v[:rank] * on_a[:, None]
    for row in torch.nonzero(kept == 0).flatten().tolist():
        a[row] = (2 * key.fold(row).uniform(inputs) - 1) / math.sqrt(inputs)
    return LowRank(a.float(), b.float(), float(energies[:rank].sum()), float(energies.sum()))
