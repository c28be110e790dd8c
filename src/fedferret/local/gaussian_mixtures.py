"""Gaussian mixtures: fitted to rows by scikit-learn's expectation maximisation, and drawn from.

    p(x) = Σ_k w_k N(x; μ_k, Σ_k)        x of H values

    "spherical"   Σ_k = v I             1 value
    "diagonal"    Σ_k = diag(v)         H values
    "full"        Σ_k symmetric         H (H + 1) / 2 values, its lower half row by row

EM begins from k-means. With one component there is nothing to iterate: the mixture has the rows' mean and biased
covariance. All is fp64 on the CPU; draws are fp32.

scikit-learn's last digits may depend on its number of threads. Clients alone fit, each its own rows, and no other node
repeats that; what all nodes must agree on are the draws, which are ours.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from fedferret.bases.gaussian import add_gaussian_
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.feature_statistics import FeaturesRefused

Kind = Literal["spherical", "diagonal", "full"]

_ITERATIONS = 100  # of EM, at most; scikit-learn's
_TOLERANCE = 1e-4  # nats per row: EM that gains less is over; scikit-learn's is 1e-3


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


def check_installed() -> None:
    """Refuse where scikit-learn is missing.

    Raises:
        UserError: with the command that installs it.
    """
    if find_spec("sklearn") is None:
        raise UserError('Gaussian mixtures need scikit-learn: pip install "fedferret[mixtures]"')


def fit(x_NH: Tensor, components: int, kind: Kind, floor: float, key: Key) -> Mixture:
    """Fit a mixture.

    Args:
        x_NH: finite rows, at least two and at least K, fp64 on the CPU.
        components: K.
        kind: of the covariances.
        floor: added to every variance, so that each is positive.
        key: draws where k-means begins.

    Returns:
        The mixture, fp64.

    Raises:
        FeaturesRefused: rows so large that a covariance is not positive in fp64.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    centre_H = x_NH.mean(dim=0)  # variances lose no digits to a large mean
    model = GaussianMixture(
        components,
        covariance_type="diag" if kind == "diagonal" else kind,
        tol=_TOLERANCE,
        reg_covar=floor,
        max_iter=_ITERATIONS if components > 1 else 0,
        init_params="kmeans",
        random_state=key.fold("k-means").words[0],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a mixture that is still improving is one too
        try:
            model.fit((x_NH - centre_H).numpy())
        except ValueError as error:
            if "ill-defined" not in str(error):
                raise
            raise FeaturesRefused(
                f"features too large for floor={floor}: a covariance is not positive; raise it"
            ) from None
    weights_K, means_KH, covariances = map(torch.from_numpy, (model.weights_, model.means_, model.covariances_))
    if kind == "full":
        covariances = torch.stack([packed(each_HH, kind) for each_HH in covariances])
    return Mixture(weights_K, means_KH + centre_H, covariances.reshape(components, -1))


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
