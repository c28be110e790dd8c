"""Gaussian mixtures: draws have the mixture's parameters, and the bound that differential privacy needs."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedferret.algorithms.fedpft import FedPFT
from fedferret.algorithms.fedpft_client import Fitting
from fedferret.algorithms.fedpft_server import Features, drawn_features, rows_of, train_head
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.feature_statistics import FeaturesRefused
from fedferret.local.first_order import FirstOrder
from fedferret.local.gaussian_mixtures import Kind, Mixture, are_positive, draw, fit
from fedferret.objectives.classification import Classification
from toys import normal

KEY = Key.of(9)
WEIGHTS, MEANS = torch.tensor([0.7, 0.3]).double(), torch.tensor([[0.0, 0.0, 3.0], [4.0, -4.0, 0.0]]).double()
COVARIANCES: dict[Kind, Tensor] = {
    "spherical": torch.tensor([[0.5], [2.0]]).double(),
    "diagonal": torch.tensor([[0.1, 1.0, 0.4], [2.0, 0.5, 0.2]]).double(),
    "full": torch.tensor([[1.0, 0.5, 1.0, -0.3, 0.2, 1.0], [0.5, 0.0, 2.0, 0.1, 0.1, 0.3]]).double(),
}


@pytest.mark.parametrize("kind", COVARIANCES)
def test_a_mixture_that_is_fitted_to_draws_is_the_one_they_were_drawn_from(kind: Kind) -> None:
    x_NH = draw(Mixture(WEIGHTS, MEANS, COVARIANCES[kind]), kind, 10_000, KEY, 0)
    found = fit(x_NH.double(), 2, kind, 1e-6, KEY)
    order = found.weights_K.argsort(descending=True)
    torch.testing.assert_close(found.weights_K[order], WEIGHTS, rtol=0, atol=0.01)
    torch.testing.assert_close(found.means_KH[order], MEANS, rtol=0, atol=0.05)
    torch.testing.assert_close(found.covariances_KS[order], COVARIANCES[kind], rtol=0.05, atol=0.05)


def moved(before_NH: Tensor, after_NH: Tensor) -> Tensor:
    """The squared distance between the means and the biased covariances of two sets of rows."""
    pairs = zip(*((x_NH.mean(dim=0), torch.cov(x_NH.T, correction=0)) for x_NH in (before_NH, after_NH)), strict=True)
    return sum(((left - right).square().sum() for left, right in pairs), torch.zeros(()).double())


def test_replacing_one_of_n_points_of_the_unit_ball_moves_mean_and_covariance_by_at_most_2_root_5_over_n() -> None:
    """Climbs from drawn points; docs/methods/fedpft.md has the proof."""
    n, most = 30, 0.0
    for start in range(2):
        points = nn.Parameter(normal(KEY.fold(start), n + 1, 3).double())
        optimizer = torch.optim.Adam([points], lr=0.2)
        for _ in range(60):
            x_NH = points / points.norm(dim=1, keepdim=True).clamp(min=1)
            squared = moved(x_NH[:-1], x_NH[1:])
            most = max(most, n * math.sqrt(float(squared.detach())))
            optimizer.zero_grad()
            (-squared).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        x_NH = x_NH.detach()
        one, other = (fit(each, 1, "full", 1e-6, KEY) for each in (x_NH[:-1], x_NH[1:]))
        covariance_HH = torch.cov(x_NH[:-1].T, correction=0) + 1e-6 * torch.eye(3)
        torch.testing.assert_close(one.covariances_KS[0], covariance_HH[*torch.tril_indices(3, 3)])
        sent = (one.means_KH - other.means_KH).square().sum() + (
            one.covariances_KS - other.covariances_KS
        ).square().sum()
        assert float(sent) <= float(squared.detach()) + 1e-12  # half of a symmetric matrix moves no more
    assert 4.3 < most <= math.sqrt(4 + 16 * ((n - 1) / n) ** 2) < 2 * math.sqrt(5)


@pytest.mark.parametrize("kind", COVARIANCES)
def test_a_key_gives_the_same_mixture_again_without_a_warning_even_of_rows_that_repeat(kind: Kind) -> None:
    x_NH = torch.cat([normal(KEY, 30, 3), torch.ones(10, 3)]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows_NH in (x_NH, x_NH[-10:]):  # the second: one place for three components
            one, again = (fit(rows_NH, 3, kind, 1e-6, KEY) for _ in range(2))
            assert all(torch.equal(getattr(one, name), getattr(again, name)) for name in vars(one))
            assert are_positive(one.covariances_KS, kind, 3) and math.isclose(float(one.weights_K.sum()), 1)


def test_rows_too_large_for_a_positive_covariance_are_refused_and_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x_NH = 1e8 * normal(KEY, 4, 6).double()
    with pytest.raises(FeaturesRefused, match="too large for floor=1e-06"):
        fit(x_NH, 1, "full", 1e-6, KEY)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r'need scikit-learn: pip install "fedferret\[mixtures\]"'):
        FedPFT().check(nn.Linear(1, 1), 1)


def test_on_anisotropic_features_full_covariances_keep_what_the_features_say_and_spherical_ones_lose_most() -> None:
    """Five classes of two modes each, five clients of two classes, variances that differ a hundredfold."""
    classes, width, per_class = 5, 16, 240
    scale_H = torch.logspace(-1, 0.6, width)
    parts = []
    for label in range(classes):
        modes = 0.25 * normal(KEY.fold("mode", label), 2, width)
        noise = normal(KEY.fold("noise", label), 2 * per_class, width) * scale_H
        parts.append(noise + modes.repeat(per_class, 1))
    x_CNH = torch.stack(parts)
    training, held_out = x_CNH[:, :per_class], x_CNH[:, per_class:].flatten(0, 1)
    task = Task.of(nn.Linear(1, 1), Classification(classes=tuple("abcde")), 1)
    labels = torch.arange(classes)

    def accuracy(features: Features) -> float:
        head: Any = nn.utils.skip_init(nn.Linear, width, classes)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        how = FirstOrder(optimizer="adamw", learning_rate=0.03, clip=None, epochs=12, batch_size=128)
        train_head(task, head, features, how, KEY)
        with torch.no_grad():
            return float((head(held_out).argmax(1) == labels.repeat_interleave(per_class)).float().mean())

    def synthetic(kind: Kind) -> Features:
        each, half = [], per_class // 2
        for client in range(classes):
            own = [(training[client, :half], client), (training[(client + 1) % classes, half:], (client + 1) % classes)]
            batches = [(x.double(), torch.full((half,), label)) for x, label in own]
            each.append(Fitting(1, kind, 1e-6, 2).mixtures(batches, None, 1, KEY.fold(client)))
        return drawn_features(each, rows_of(each, [float(per_class)] * classes, 10_000), kind, KEY)

    central = accuracy(Features(training.flatten(0, 1), labels.repeat_interleave(per_class)))
    found = {kind: accuracy(synthetic(kind)) for kind in COVARIANCES}
    print(central, found)
    assert central + 0.02 > found["full"] > found["diagonal"] - 0.02 and found["diagonal"] > found["spherical"] + 0.1
