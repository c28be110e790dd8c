"""Gaussian mixtures: fitted to rows by expectation maximisation, and drawn from.

    p(x) = Σ_k w_k N(x; μ_k, Σ_k)        x of H values
    E      r_nk = w_k N(x_n; μ_k, Σ_k) / p(x_n)
    M      n_k = Σ_n r_nk      w_k = n_k / N      μ_k = Σ_n r_nk x_n / n_k
           Σ_k = Σ_n r_nk (x_n - μ_k)(x_n - μ_k)ᵀ / n_k + floor I

    "spherical"   Σ_k = v I             1 value
    "diagonal"    Σ_k = diag(v)         H values
    "full"        Σ_k symmetric         H (H + 1) / 2 values, its lower half row by row

EM begins from k-means, and k-means from k-means++ (Arthur, Vassilvitskii, SODA 2007). With one component there is one M
step, and the mixture has the rows' mean and biased covariance. All is fp64 on the CPU; draws are fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedferret.bases.gaussian import add_gaussian_
from fedferret.core.keys import Key

Kind = Literal["spherical", "diagonal", "full"]

ITERATIONS = 100  # of EM, at most; scikit-learn's
TOLERANCE = 1e-4  # nats per row: EM that gains less is over; scikit-learn's is 1e-3
_LLOYD = 10  # iterations of k-means, which EM refines anyway
_TINY = 1e-12  # rows of a component that has none


@dataclass(frozen=True)
class Mixture:
    """K Gaussians over H values.

    Attributes:
        weights_K: w, which sum to 1.
        means_KH: μ.
        covariances_KS: Σ, the S values of a kind.
    """

    weights_K: Tensor
    means_KH: Tensor
    covariances_KS: Tensor


def num_values(kind: Kind, width: int) -> int:
    """Count the values of a covariance.

    Args:
        kind: of the covariance.
        width: H.

    Returns:
        S.
    """
    return {"spherical": 1, "diagonal": width, "full": width * (width + 1) // 2}[kind]


def packed(covariance_HH: Tensor, kind: Kind) -> Tensor:
    """The values of a kind that describe a covariance best.

    Args:
        covariance_HH: symmetric.
        kind: of the result.

    Returns:
        The mean variance, the variances, or the lower half; shape (S,).
    """
    if kind == "full":
        rows, columns = torch.tril_indices(*covariance_HH.shape)
        return covariance_HH[rows, columns]
    variances_H = covariance_HH.diagonal()
    return variances_H.mean()[None] if kind == "spherical" else variances_H.clone()


def fit(x_NH: Tensor, components: int, kind: Kind, floor: float, key: Key, iterations: int = ITERATIONS) -> Mixture:
    """Fit a mixture.

    Args:
        x_NH: rows, at least one.
        components: K.
        kind: of the covariances.
        floor: added to every variance, so that each is positive.
        key: draws where k-means begins.
        iterations: of EM, at most.

    Returns:
        The mixture.
    """
    centre_H = x_NH.mean(dim=0)
    x_NH = x_NH - centre_H  # variances lose no digits to a large mean
    labels_N = _k_means(x_NH, components, key)
    mixture = _maximised(x_NH, torch.nn.functional.one_hot(labels_N, components).double(), kind, floor)
    before = -math.inf
    for _ in range(iterations if components > 1 else 0):
        joint_NK = _log_joint(x_NH, mixture, kind)
        total_N = joint_NK.logsumexp(dim=1)
        found = float(total_N.mean())
        if found - before < TOLERANCE:
            break
        before, mixture = found, _maximised(x_NH, (joint_NK - total_N[:, None]).exp(), kind, floor)
    return replace(mixture, means_KH=mixture.means_KH + centre_H)


def draw(mixture: Mixture, kind: Kind, rows: int, key: Key, column: int) -> Tensor:
    """Draw rows from a mixture.

    Args:
        mixture: of any float type.
        kind: of its covariances.
        rows: N.
        key: of all draws; with the same key no two columns have a value in common.
        column: which draw this is, from 0.

    Returns:
        Shape (N, H), fp32.
    """
    means_KH, width = mixture.means_KH.double(), mixture.means_KH.shape[1]
    noise_NH = add_gaussian_(torch.zeros(rows, width), key, column, 1.0).double()
    shares_K = mixture.weights_K.double().cumsum(dim=0)
    places_N = torch.searchsorted(shares_K, key.fold("component", column).uniform(rows) * shares_K[-1])
    places_N.clamp_(max=len(shares_K) - 1)
    if kind == "full":
        roots_KHH = torch.linalg.cholesky(_matrices(mixture.covariances_KS.double(), width))
        for place, root_HH in enumerate(roots_KHH):
            noise_NH[places_N == place] = noise_NH[places_N == place] @ root_HH.T
    else:
        noise_NH *= mixture.covariances_KS.double().sqrt()[places_N]
    return (means_KH[places_N] + noise_NH).float()


def are_positive(covariances_KS: Tensor, kind: Kind, width: int) -> bool:
    """Whether covariances are positive definite.

    Args:
        covariances_KS: finite, of any float type.
        kind: theirs.
        width: H.

    Returns:
        Whether all are.
    """
    if kind != "full":
        return bool((covariances_KS > 0).all())
    each = (_matrices(one_S[None].double(), width) for one_S in covariances_KS)  # one matrix in memory
    return not any(bool(torch.linalg.cholesky_ex(matrix_1HH).info.any()) for matrix_1HH in each)


def rounded(mixture: Mixture, kind: Kind, floor: float) -> Mixture:
    """A mixture in fp32, with covariances that are positive definite after rounding too.

    Args:
        mixture: fp64.
        kind: of its covariances.
        floor: more is added to the variances where rounding needs it: ten times as much, then a hundred times.

    Returns:
        The mixture, fp32.
    """
    width, covariances_KS = mixture.means_KH.shape[1], mixture.covariances_KS
    rows, columns = torch.tril_indices(width, width) if kind == "full" else torch.zeros(2, 1)
    while not are_positive(covariances_KS.float(), kind, width):
        floor *= 10
        covariances_KS = covariances_KS + floor * (rows == columns).double()
    return Mixture(mixture.weights_K.float(), mixture.means_KH.float(), covariances_KS.float())


def _matrices(covariances_KS: Tensor, width: int) -> Tensor:
    """Full covariances as matrices, (K, H, H)."""
    rows, columns = torch.tril_indices(width, width)
    matrices_KHH = covariances_KS.new_empty(len(covariances_KS), width, width)
    matrices_KHH[:, rows, columns] = covariances_KS
    matrices_KHH[:, columns, rows] = covariances_KS
    return matrices_KHH


def _log_joint(x_NH: Tensor, mixture: Mixture, kind: Kind) -> Tensor:
    """log w_k + log N(x_n; μ_k, Σ_k), shape (N, K)."""
    means_KH, width = mixture.means_KH, x_NH.shape[1]
    if kind == "full":
        roots_KHH = torch.linalg.cholesky(_matrices(mixture.covariances_KS, width))
        halves_K = roots_KHH.diagonal(dim1=1, dim2=2).log().sum(dim=1)  # of log det Σ
        pairs = zip(means_KH, roots_KHH, strict=True)
        scaled = [torch.linalg.solve_triangular(root, (x_NH - mean).T, upper=False) for mean, root in pairs]
        squares_NK = torch.stack([each_HN.square().sum(dim=0) for each_HN in scaled], dim=1)
    else:
        variances_KH = mixture.covariances_KS.expand(-1, width)
        halves_K = variances_KH.log().sum(dim=1) / 2
        squares_NK = x_NH.square() @ (1 / variances_KH).T - 2 * x_NH @ (means_KH / variances_KH).T
        squares_NK += (means_KH.square() / variances_KH).sum(dim=1)
    joint_NK: Tensor = mixture.weights_K.log() - halves_K - width / 2 * math.log(2 * math.pi) - squares_NK / 2
    return joint_NK


def _maximised(x_NH: Tensor, shares_NK: Tensor, kind: Kind, floor: float) -> Mixture:
    """The M step."""
    counts_K = shares_NK.sum(dim=0).clamp(min=_TINY)
    means_KH = shares_NK.T @ x_NH / counts_K[:, None]
    if kind == "full":
        covariances = []
        for mean_H, share_N, count in zip(means_KH, shares_NK.T, counts_K, strict=True):
            apart_NH = x_NH - mean_H
            matrix_HH = (share_N[:, None] * apart_NH).T @ apart_NH / count
            matrix_HH.diagonal().add_(floor)
            covariances.append(packed(matrix_HH, kind))
        covariances_KS = torch.stack(covariances)
    else:
        covariances_KS = (shares_NK.T @ x_NH.square() / counts_K[:, None] - means_KH.square()).clamp(min=0)
        if kind == "spherical":
            covariances_KS = covariances_KS.mean(dim=1, keepdim=True)
        covariances_KS = covariances_KS + floor
    return Mixture(counts_K / counts_K.sum(), means_KH, covariances_KS)


def _k_means(x_NH: Tensor, components: int, key: Key) -> Tensor:
    """The number of the nearest of K centres, for every row."""
    first, *draws = key.fold("k-means").uniform(components).tolist()
    centres = [x_NH[int(first * len(x_NH))]]
    nearest_N = (x_NH - centres[0]).square().sum(dim=1)
    for chosen in draws:  # with a probability that grows with the squared distance to the nearest centre
        sums_N = nearest_N.cumsum(dim=0)
        place = int(torch.searchsorted(sums_N, chosen * sums_N[-1]).clamp(max=len(x_NH) - 1))
        centres.append(x_NH[place])
        nearest_N = torch.minimum(nearest_N, (x_NH - centres[-1]).square().sum(dim=1))
    centres_KH = torch.stack(centres)
    for _ in range(_LLOYD if components > 1 else 1):
        labels_N = torch.cdist(x_NH, centres_KH).argmin(dim=1)
        counts_K = torch.bincount(labels_N, minlength=components)
        sums_KH = torch.zeros_like(centres_KH).index_add_(0, labels_N, x_NH)
        centres_KH = torch.where(counts_K[:, None] > 0, sums_KH / counts_K.clamp(min=1)[:, None], centres_KH)
    return labels_N
