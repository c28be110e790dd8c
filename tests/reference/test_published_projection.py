"""The dense basis against the published projection, implemented from its formula."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedferret.bases.registry import basis
from fedferret.bases.truncated_normal import kurtosis, variance
from fedferret.core.keys import Key

DENSE = basis("truncated-normal")


@pytest.fixture(scope="module")
def published() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "published_projection.py"
    spec = importlib.util.spec_from_file_location("published_projection", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_column(size: int, key: Key) -> torch.Tensor:
    return DENSE.expand_(torch.zeros(size), torch.ones(1), key)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 4096, 10**6])
def test_the_variance_series_is_the_closed_form(published: ModuleType, size: int) -> None:
    assert variance(size) == pytest.approx(published.variance(size), rel=1e-8)


@pytest.mark.parametrize("size", [10**7, 10**9, 10**11])
def test_the_variance_is_accurate_where_the_closed_form_cancels(size: int) -> None:
    assert variance(size) == pytest.approx((1 - 2 / (15 * size)) / (3 * size), rel=1e-14)


@pytest.mark.parametrize("size", [1, 2, 5, 100, 50_000])
def test_both_draw_elements_of_the_same_distribution(published: ModuleType, size: int) -> None:
    repeats = max(4, 100_000 // size)
    repeats = min(repeats, 2_000)
    theirs = torch.cat([published.column(size, seed) for seed in range(repeats)])
    ours = torch.cat([our_column(size, Key.of(5, number)) for number in range(repeats)]).double()
    count = ours.numel()
    assert ours.abs().max() <= size**-0.5 * (1 + 1e-6)
    assert abs(ours.mean()) < 4 * math.sqrt(variance(size) / count)
    # the relative variance of a mean square of n values is (kappa - 1)/n: four standard deviations, both ways
    tolerance = 4 * math.sqrt((kurtosis(size) - 1) / count)
    assert ours.square().mean() / variance(size) == pytest.approx(1, abs=tolerance)
    assert ours.square().mean() / theirs.square().mean() == pytest.approx(1, abs=1.5 * tolerance)
    # the Kolmogorov-Smirnov distance between the two samples
    values = torch.cat((ours, theirs)).sort().values
    distance = (torch.searchsorted(ours.sort().values, values, right=True) / count) - (
        torch.searchsorted(theirs.sort().values, values, right=True) / count
    )
    assert distance.abs().max() < 2.2 * math.sqrt(2 / count)


def test_both_reconstruct_with_the_same_mean_and_error(published: ModuleType) -> None:
    size, num_coordinates, repeats = 300, 10, 400
    delta = Key.of(3).uniform(size).float() - 0.3
    expected = DENSE.error_energy(size, num_coordinates)
    ours = [
        DENSE.expand_(torch.zeros(size), DENSE.project(delta, num_coordinates, key), key)
        for key in (Key.of(8, number) for number in range(repeats))
    ]
    theirs = [
        published.expand(published.project(delta, num_coordinates, 1000 * number), size, 1000 * number).float()
        for number in range(repeats)
    ]
    for results in (ours, theirs):
        reconstructions = torch.stack(results)
        energy = ((reconstructions - delta).square().sum(dim=1) / delta.square().sum()).mean()
        assert 0.95 * expected < energy < 1.05 * expected
        # the error of the mean of n unbiased reconstructions is the error energy over n
        error_of_mean = (reconstructions.mean(dim=0) - delta).square().sum() / delta.square().sum()
        assert 0.6 < error_of_mean * repeats / expected < 1.5
