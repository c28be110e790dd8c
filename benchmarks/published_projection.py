"""The published projection as its formula reads: slow, faithful, and the yardstick for this project's bases.

Ferret (arXiv 2409.06277, section 4.1): column k of V is d numbers from N(0, 1) cut to ±1/√d, drawn by a generator with
its own seed; the coordinates are (rho K)^-1 Vᵀ Δ with rho the variance of a cut normal, and the update is read back as
V c. A column is drawn, used and dropped, as the published program does. Nothing is shared with the package, so that
a mistake there cannot hide here. Cost: O(d K), in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def column(size: int, seed: int) -> Tensor:
    """One column of V, fp64 (size,): the inverse distribution function of uniforms between that of ±1/√size."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(size, generator=generator, dtype=torch.float64)
    half_mass = math.erf(math.sqrt(0.5 / size)) / 2
    drawn: Tensor = torch.special.ndtri(0.5 + (2 * uniforms - 1) * half_mass)
    return drawn


def variance(size: int) -> float:
    """rho in closed form, 1 - 2 a phi(a) / (2 Phi(a) - 1) with a = 1/√size; in fp64 good up to a million weights."""
    bound = math.sqrt(1 / size)
    density = math.exp(-0.5 * bound**2) / math.sqrt(2 * math.pi)
    return 1 - 2 * bound * density / math.erf(bound / math.sqrt(2))


def project(delta_D: Tensor, num_coordinates: int, seed: int) -> Tensor:
    """The coordinates of an update, fp64 (num_coordinates,)."""
    scale = 1 / (variance(delta_D.numel()) * num_coordinates)
    columns = (column(delta_D.numel(), seed + k) for k in range(num_coordinates))
    return torch.stack([(v * delta_D.double()).sum() for v in columns]) * scale


def expand(coordinates_K: Tensor, size: int, seed: int) -> Tensor:
    """The update that coordinates stand for, fp64 (size,)."""
    update = torch.zeros(size, dtype=torch.float64)
    for k, coordinate in enumerate(coordinates_K.tolist()):
        update += coordinate * column(size, seed + k)
    return update
