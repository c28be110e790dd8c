"""Sums of features by class: those of a direct computation, whatever the batches; what cannot be counted is refused."""

from __future__ import annotations

import pytest
import torch

from fedferret.core.task import Task
from fedferret.local.feature_statistics import FeaturesRefused, feature_statistics, features_of
from toy_classifier import THREE_CLASSES
from toys import Rows, ToyData, toy_classifier, toy_clients


def task() -> Task:
    return Task.of(toy_classifier(), THREE_CLASSES, 1)


def test_the_sums_are_those_of_all_examples_whatever_the_batches() -> None:
    data = toy_clients()["c"]
    (rows,) = data.batches(len(data), None)
    with torch.no_grad():
        x_NH = task().model.features(rows).double()  # type: ignore[operator]
    one_hot_NC = torch.nn.functional.one_hot(rows.labels, 3).double()
    for size in (1, 4, 64):
        found = feature_statistics(features_of(task(), data, size), 3, order=2)
        assert torch.equal(found.counts_C, one_hot_NC.sum(0).long()) and found.moments_CHH is not None
        torch.testing.assert_close(found.sums_CH, one_hot_NC.T @ x_NH, rtol=0, atol=1e-6)
        moments_CHH = torch.einsum("nc,nh,nk->chk", one_hot_NC, x_NH, x_NH)
        torch.testing.assert_close(found.moments_CHH, moments_CHH, rtol=0, atol=1e-6)
    assert feature_statistics(features_of(task(), data), 5).moments_CHH is None


def test_features_that_are_not_finite_and_no_examples_are_refused() -> None:
    good = toy_clients(1)["a"]
    bad = ToyData(good.x.clone(), good.y)  # type: ignore[attr-defined]
    bad.x[1] = torch.inf
    bad.x[4, 2] = torch.nan
    with pytest.raises(FeaturesRefused, match="features of 2 of 9 examples hold NaN"):
        list(features_of(task(), bad))
    with pytest.raises(FeaturesRefused, match="no example"):
        list(features_of(task(), ToyData(bad.x[:0], bad.y[:0])))


def test_a_label_is_the_range_of_the_target() -> None:
    targets = torch.tensor([[-0.9], [0.0], [0.9]])
    assert Rows(torch.zeros(3, 4), targets).labels.tolist() == [0, 1, 2]
