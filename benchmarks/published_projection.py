"""The published projection, implemented literally from its formula: slow, and the baseline for the bases.

Ferret (arXiv 2409.06277, section 4.1): column k of V is d values from N(0, 1) truncated to ±1/√d, drawn by a generator
with a separate seed. The coordinates are (rho K)^-1 Vᵀ Δ with rho the variance of a truncated normal, and the
reconstructed update is V c. A column is drawn, used and dropped, as in the published program. This module imports
nothing of the package, so that an error there cannot repeat here. Cost: O(d K), in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def column(size: int, seed: int) -> Tensor:
    """One column of V, by the inverse distribution function.

    Args:
        size: d.
        seed: of the column's generator.
    Returns:
        fp64, shape (size,), in ±1/√size.
    """
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(size, generator=generator, dtype=torch.float64)
    half_mass = math.erf(math.sqrt(0.5 / size)) / 2
    drawn: Tensor = torch.special.ndtri(0.5 + (2 * uniforms - 1) * half_mass)
    return drawn


def variance(size: int) -> float:
    """rho in closed form, 1 - 2 a phi(a) / (2 Phi(a) - 1) with a = 1/√size; fp64 suffices up to a million weights."""
    bound = math.sqrt(1 / size)
    density = math.exp(-0.5 * bound**2) / math.sqrt(2 * math.pi)
    return 1 - 2 * bound * density / math.erf(bound / math.sqrt(2))


def project(delta_D: Tensor, num_coordinates: int, seed: int) -> Tensor:
    """The coordinates of an update.

    Args:
        delta_D: any float dtype, shape (D,).
        num_coordinates: K.
        seed: of column 0; column k has ``seed + k``.
    Returns:
        fp64, shape (K,).
    """
    scale = 1 / (variance(delta_D.numel()) * num_coordinates)
    columns = (column(delta_D.numel(), seed + k) for k in range(num_coordinates))
    return torch.stack([(v * delta_D.double()).sum() for v in columns]) * scale


def expand(coordinates_K: Tensor, size: int, seed: int) -> Tensor:
    """The reconstructed update V c.

    Args:
        coordinates_K: c, any float dtype, shape (K,).
        size: d.
        seed: as in ``project``.
    Returns:
        fp64, shape (size,).
    """
    update = torch.zeros(size, dtype=torch.float64)
    for k, coordinate in enumerate(coordinates_K.tolist()):
        update += coordinate * column(size, seed + k)
    return update
