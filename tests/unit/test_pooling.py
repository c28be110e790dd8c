"""Pools: means, sums and robust pools as defined; nothing that is not finite or of another form."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedferret.core.algorithm import Pooling
from fedferret.core.errors import UserError
from fedferret.core.exchanges import Masked
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.pooling import EachPool, MeanPool, NotFinite, Pool, SumPool, nonfinite
from fedferret.core.robust_pooling import PoolSettings


@message
class Parts:
    x: Tensor
    share: float
    named: dict[str, Tensor]
    count: int = 3


@message
class Vector:
    x: Tensor


def parts(number: int) -> Parts:
    x = Key.of(number).uniform(12).float()
    return Parts(x[:8], float(x[0]), {"a": x[8:].reshape(2, 2)})


def pooled(pool: Pool, *given: tuple[Any, float]) -> Any:
    for sum, weight in given:
        pool.add(sum, weight)
    return pool.result()


def robust(name: Any, **options: Any) -> Pool:
    return PoolSettings(name=name, **options).pool(Pooling.MEAN)


def test_a_mean_is_the_weighted_mean() -> None:
    weights = [1.0, 2.5, 7.0]
    result = pooled(MeanPool(), *((parts(number), weight) for number, weight in enumerate(weights))).only
    expected = sum(weight * parts(number).x.double() for number, weight in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(result.x.double(), expected, rtol=1e-6, atol=1e-7)
    assert result.share == pytest.approx(sum(w * parts(n).share for n, w in enumerate(weights)) / sum(weights))
    assert result.named["a"].shape == (2, 2) and result.count == 3


def test_one_payload_and_many_equal_ones_are_their_mean_to_the_bit() -> None:
    for count in (1, 2, 5):
        result = pooled(MeanPool(), *[(parts(1), 3.0 + count)] * count).only
        assert torch.equal(result.x, parts(1).x) and result.share == parts(1).share


def test_a_sum_ignores_weights_and_adds_integers_too_and_each_keeps_apart_in_order() -> None:
    sums = [Vector(torch.full((2,), number)) for number in (1, 2, 4)]  # int64
    assert pooled(SumPool(), *((part, 9.0 * n + 1) for n, part in enumerate(sums))).only.x.tolist() == [7, 7]
    assert pooled(SumPool(), (parts(1), 1.0), (parts(2), 1.0)).only.count == 6
    apart = [Vector(torch.tensor([float(number)] * number)) for number in (3, 1, 2)]  # each of its length
    result = pooled(EachPool(), *((part, 1.0) for part in apart))
    assert [len(each.x) for each in result.sums] == [3, 1, 2] and result.weights == (1.0, 1.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(0, 96), min_size=1, max_size=9))
def test_masked_integers_add_up_modulo_their_modulus(values: list[int]) -> None:
    sums = [(Masked(Vector(torch.tensor([value, 96 - value])), 97), 1.0) for value in values]
    result = pooled(SumPool(), *sums).only
    assert result.sum.x.tolist() == [sum(values) % 97, sum(96 - value for value in values) % 97]
    with pytest.raises(ValueError, match="modulo 96"):
        pooled(SumPool(), *sums, (Masked(Vector(torch.tensor([1, 2])), 96), 1.0))


vectors = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=3, max_size=9)


@settings(max_examples=60, deadline=None)
@given(rows=vectors)
def test_median_and_trimmed_mean_are_what_they_are_coordinate_by_coordinate(rows: list[list[float]]) -> None:
    sums = [(Vector(torch.tensor(row)), 1.0 + place) for place, row in enumerate(rows)]
    columns = list(zip(*rows, strict=True))
    median = pooled(robust("median"), *sums).only.x.tolist()
    assert median == pytest.approx([statistics.median(column) for column in columns], rel=1e-5, abs=1e-4)
    cut = math.floor(0.34 * len(rows))
    trimmed = pooled(robust("trimmed-mean", trim_fraction=0.34), *sums).only.x.tolist()
    expected = [statistics.fmean(sorted(column)[cut : len(rows) - cut]) for column in columns]
    assert trimmed == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "multi-krum", "norm-bounded-mean"])
def test_one_hostile_client_of_seven_moves_no_robust_pool_far(name: str) -> None:
    honest = [(Vector(torch.tensor([1.0, -1.0, 0.5]) + 0.01 * number), 1.0) for number in range(6)]
    hostile = (Vector(torch.tensor([1e6, 1e6, -1e6])), 1.0)
    options = {"trim_fraction": 0.2, "krum_fraction": 0.2}
    alone = pooled(robust(name, **options), *honest).only.x
    attacked = pooled(robust(name, **options), *honest[:3], hostile, *honest[3:]).only.x
    assert float((attacked - alone).norm()) < (0.6 if name == "norm-bounded-mean" else 0.05)
    assert float(pooled(MeanPool(), *honest, hostile).only.x.norm()) > 1e5  # the plain mean is carried away


def test_a_norm_bound_scales_down_what_is_above_it_and_nothing_else() -> None:
    sums = [(Vector(torch.tensor([3.0, 4.0])), 1.0), (Vector(torch.tensor([0.3, 0.4])), 1.0)]
    assert pooled(robust("norm-bounded-mean", norm_bound=1.0), *sums).only.x.tolist() == pytest.approx([0.45, 0.6])
    assert pooled(robust("norm-bounded-mean", norm_bound=9.0), *sums).only.x.tolist() == pytest.approx([1.65, 2.2])
    of_updates = robust("norm-bounded-mean", norm_bound=1.0)  # the norm of what it does to the weights, if it is known
    of_updates.add(Vector(torch.tensor([3.0, 4.0])), 1.0, norm=0.5)
    assert of_updates.result().only.x.tolist() == [3.0, 4.0]


def test_multi_krum_is_the_mean_of_those_nearest_to_their_neighbours() -> None:
    places = [0.0, 0.1, 0.2, 5.0, 0.15]
    sums = [(Vector(torch.tensor([place])), 1.0) for place in places]
    result = pooled(robust("multi-krum", krum_fraction=0.2), *sums).only.x
    assert result.item() == pytest.approx(statistics.fmean([0.0, 0.1, 0.2, 0.15]), rel=1e-6)


def test_pooling_leaves_the_payloads_alone() -> None:
    for pool in (MeanPool(), SumPool(), robust("median"), robust("norm-bounded-mean")):
        first, second, third = parts(1), parts(2), parts(3)
        pooled(pool, (first, 1.0), (second, 1.0), (third, 2.0))
        assert all(torch.equal(each.x, parts(n).x) for n, each in ((1, first), (2, second), (3, third)))


@pytest.mark.parametrize("pool", [MeanPool, SumPool, lambda: robust("median"), lambda: robust("multi-krum")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_or_of_another_form_is_refused_and_leaves_the_pool_alone(pool: Any, bad: float) -> None:
    pool = pool()
    for number in (1, 2, 3):
        pool.add(parts(number), 1.0)
    wrong = parts(2)
    wrong.named["a"][1, 1] = bad
    with pytest.raises(NotFinite, match=r"named\[a\] holds NaN or infinity"):
        pool.add(wrong, 1.0)
    with pytest.raises(NotFinite, match="share holds NaN or infinity"):
        pool.add(Parts(parts(2).x, bad, parts(2).named), 1.0)
    for weight in (bad, 0.0, -1.0):
        with pytest.raises(NotFinite, match=r"weight .*: must be positive and finite"):
            pool.add(parts(2), weight)
    good = parts(2)
    for strange in (
        Parts(good.x[1:], good.share, good.named),
        Parts(good.x.double(), good.share, good.named),
        Parts(good.x, 1, good.named),
        Parts(good.x, good.share, {"b": good.named["a"]}),
        Vector(good.x),
        Parts(good.x, good.share, {"a": {"b": good.named["a"]}}),
        Parts(good.x, good.share, {**good.named, "b": good.named["a"]}),
        Parts(good.x, good.share, (good.named["a"],)),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="does not pool"):
            pool.add(strange, 1.0)
    assert len(pool) == 3
    untouched = type(pool)(*([0.2] if "Krum" in type(pool).__name__ else []))
    expected = pooled(untouched, *((parts(number), 1.0) for number in (1, 2, 3))).only
    assert torch.equal(pool.result().only.x, expected.x) and nonfinite(parts(1)) is None


TWO = torch.tensor([1, 2])
NESTED: list[tuple[Any, Any]] = [  # forms that look alike: a refused addition must not have begun
    ((TWO, {"0": TWO}), (TWO, (TWO,))),
    ((TWO, {"a][b": TWO}), (TWO, {"a": {"b": TWO}})),
    ((TWO, Vector(TWO)), (TWO, Masked(TWO, 97))),
    ((TWO, ("a",)), (TWO, ("b",))),
    ((TWO, (1,)), (TWO, (None,))),
    (Masked((TWO, "a"), 97), Masked((TWO, "a"), 96)),
    (Masked((TWO, (TWO,)), 97), Masked((TWO, {"0": TWO}), 97)),
    (Masked((TWO, None), 97), Masked((TWO, 3), 97)),
]


@pytest.mark.parametrize(("known", "other"), NESTED, ids=lambda sum: str(sum)[:40])
@pytest.mark.parametrize("kind", [SumPool, MeanPool])
def test_a_sum_that_differs_deep_inside_is_refused_and_leaves_the_pool_alone(kind: Any, known: Any, other: Any) -> None:
    pool = kind()
    pool.add(known, 1.0)
    pool.add(known, 1.0)
    with pytest.raises(ValueError, match="does not pool"):
        pool.add(other, 1.0)
    assert len(pool) == 2
    assert str(pool.result()) == str(pooled(kind(), (known, 1.0), (known, 1.0)))


@pytest.mark.parametrize(
    ("options", "pooling", "cohort", "reason"),
    [
        (
            {"name": "median"},
            Pooling.MEAN,
            2,
            "of 2 clients a median is their mean, set clients.per_round",
        ),
        ({"name": "trimmed-mean"}, Pooling.MEAN, 4, "of 4 clients it cuts off nobody, set it to at least 0.25"),
        ({"name": "trimmed-mean"}, Pooling.MEAN, 2, "of 2 clients it cuts off nobody, sample 3 or more"),
        ({"name": "multi-krum"}, Pooling.MEAN, 4, "of 4 clients it takes nobody for hostile, sample 5 or more"),
        (
            {"name": "multi-krum", "krum_fraction": 0.1},
            Pooling.MEAN,
            6,
            "of 6 clients it takes nobody for hostile, set it to at least 0.167",
        ),
        ({"name": "multi-krum", "krum_fraction": 0.4}, Pooling.MEAN, 5, "with 2 hostile clients multi-krum needs 7"),
        ({"name": "median"}, Pooling.EACH, 9, "the payloads of ferret are not averaged .*set pool.name="),
        ({"name": "norm-bounded-mean"}, Pooling.SUM, 9, "are not averaged"),
    ],
)
def test_a_pool_that_cannot_be_is_one_line(options: Any, pooling: Pooling, cohort: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        PoolSettings(**options).check(pooling, "ferret", cohort)
    PoolSettings().check(pooling, "ferret", 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trim_fraction": 0.5}, "trim_fraction=0.5: leaves no client"),
        ({"krum_fraction": 0.5}, "krum_fraction=0.5: leaves no majority"),
        ({"trim_fraction": -0.1}, "leaves no client"),
        ({"norm_bound": 0.0}, "norm_bound=0.0: must be greater than 0"),
    ],
)
def test_fractions_that_leave_nobody_are_refused(options: dict[str, float], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        PoolSettings(**options)  # type: ignore[arg-type]
