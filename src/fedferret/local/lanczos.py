"""The spectral density of a symmetric matrix that is known by its products with vectors alone.

    stochastic Lanczos quadrature, one start vector q_1 of ±1/√d:
        w = H q_j      α_j = q_j · w      w <- w, made orthogonal to q_1 .. q_j      β_j = ‖w‖      q_{j+1} = w / β_j
    T = tridiagonal(α, β): its eigenvalues λ_k are the nodes; squares of eigenvectors' first elements the weights
    density(λ) = Σ_k weight_k N(λ; λ_k, σ²),   σ² = 1e-5 max(1, λ_max − λ_min)

The weights sum to 1, so the density integrates to 1. Its integral is a sum of normal distribution functions, and needs
no bins. Recurrences are fp64 on the CPU, with full re-orthogonalisation. Ubaru, Chen, Saad, SIAM J. Matrix Anal. 2017;
the kernel is PyHessian's (Yao, Gholami, Keutzer, Mahoney, arXiv 1912.07145).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedferret.core.keys import Key

Product: TypeAlias = Callable[[Tensor], Tensor]  # of the matrix with a vector, fp64 on the CPU, shape (N,)

STEPS = 50  # of Lanczos: FedPepTAO's code has 50
_KERNEL = 1e-5  # variance of the kernel, in units of max(1, the spectrum's range)
_TINY = 1e-10  # a remainder so small beside the matrix is rounding: the vectors found so far span an invariant space
_HALVINGS = 60  # of the plateau's increment; the density is smooth, so a plateau is found long before


@dataclass(frozen=True)
class Spectrum:
    """A density in M nodes: eigenvalues in ascending order and weights that sum to 1, both fp64, shape (M,)."""

    values: Tensor
    weights: Tensor

    def above(self, threshold: float) -> float:
        """The share of the density above a threshold.

        Args:
            threshold: in units of eigenvalues.

        Returns:
            From 0 to 1.
        """
        span = float(self.values.max() - self.values.min())
        deviations = (threshold - self.values) / math.sqrt(_KERNEL * max(1.0, span))
        return float((self.weights * torch.special.ndtr(-deviations)).sum())


def spectrum(product: Product, size: int, key: Key, steps: int = STEPS) -> Spectrum:
    """Estimate the density of a matrix's eigenvalues.

    Args:
        product: of the symmetric matrix with a vector.
        size: N, rows of the matrix, at least 1.
        key: draws the signs of the start vector.
        steps: of Lanczos, at most; each takes one product.

    Returns:
        At most ``steps`` nodes, and fewer where the start vector lies in a smaller invariant space.
    """
    signs_N = (key.bits(size) & 1).double().mul_(2).sub_(1)
    basis = [signs_N / math.sqrt(size)]
    alphas: list[float] = []
    betas: list[float] = []
    largest = 0.0
    while True:
        rest_N = product(basis[-1]).double()
        alphas.append(float(basis[-1] @ rest_N))
        largest = max(largest, float(rest_N.norm()))
        if len(alphas) == min(steps, size):
            break
        known_NM = torch.stack(basis, dim=1)
        for _ in range(2):  # twice is enough: what one pass leaves by rounding, the second removes
            rest_N = rest_N - known_NM @ (known_NM.T @ rest_N)
        beta = float(rest_N.norm())
        if beta <= _TINY * largest:
            break
        betas.append(beta)
        basis.append(rest_N / beta)
    off = torch.tensor(betas, dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values_M, vectors_MM = torch.linalg.eigh(tridiagonal)
    return Spectrum(values_M, vectors_MM[0].square())


def plateau(above: Callable[[float], float], increment: float = 0.1, within: float = 0.005, equal: int = 4) -> float:
    """The share of a spectrum above the first threshold from which on the share hardly falls: FedPepTAO's code's rule.

    Args:
        above: the share above a threshold.
        increment: of the threshold, which begins at 0; halved where the share falls below half of its first value
            before it is level.
        within: shares that differ by less count as level.
        equal: shares in a row that must be level.

    Returns:
        The last of these shares, from 0 to 1.
    """
    first = above(0.0)
    for _ in range(_HALVINGS):
        shares = [first]
        while shares[-1] >= first / 2:
            shares.append(above(len(shares) * increment))
            last = shares[-equal:]
            if len(last) == equal and max(last) - min(last) < within:
                return shares[-1]
        increment /= 2
    return first


def hessian_product(loss: Callable[[], Tensor], weights: Mapping[str, Tensor]) -> Product:
    """The product of a loss's Hessian with a vector, by differentiating the gradient once more.

    Args:
        loss: computes the loss, a scalar; called once. Fused attention has no second derivative on every device, so
            attention is computed by the plain formula in it.
        weights: the leaves that the Hessian is of, by name; they must stay as they are.

    Returns:
        A function of a vector over all elements of the weights, in order of names.
    """
    leaves: Sequence[Tensor] = list(weights.values())
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        gradients = torch.autograd.grad(loss(), leaves, create_graph=True, materialize_grads=True)

    def product(vector_N: Tensor) -> Tensor:
        parts = torch.split(vector_N, [leaf.numel() for leaf in leaves])
        along = [part.to(leaf.device, leaf.dtype).view_as(leaf) for part, leaf in zip(parts, leaves, strict=True)]
        found = torch.autograd.grad(gradients, leaves, along, retain_graph=True, materialize_grads=True)
        return torch.cat([each.detach().reshape(-1).cpu().double() for each in found])

    return product
