"""Pooling: means and sums as defined, in little memory, and nothing that is not finite."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedferret.core.algorithm import Payload, Pooling
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.pooling import NotFinite, Pool, nonfinite


@message
class MeanUp(Payload):
    x: Tensor
    share: float
    named: dict[str, Tensor]
    count: int = 3


@message
class SumUp(Payload):
    pooling: ClassVar[Pooling] = Pooling.SUM
    x: Tensor


@message
class EachUp(Payload):
    pooling: ClassVar[Pooling] = Pooling.EACH
    x: Tensor


def up(number: int) -> MeanUp:
    x = Key.of(number).uniform(12).float()
    return MeanUp(x[:8], float(x[0]), {"a": x[8:].reshape(2, 2)})


def pooled(*parts: tuple[Any, float]) -> Any:
    pool: Pool[Any] = Pool()
    for payload, weight in parts:
        pool.add(payload, weight)
    return pool.result()


def test_a_mean_is_the_weighted_mean() -> None:
    weights = [1.0, 2.5, 7.0]
    result = pooled(*((up(number), weight) for number, weight in enumerate(weights))).only
    expected = sum(weight * up(number).x.double() for number, weight in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(result.x.double(), expected, rtol=1e-6, atol=1e-7)
    assert result.share == pytest.approx(sum(w * up(n).share for n, w in enumerate(weights)) / sum(weights))
    assert result.named["a"].shape == (2, 2) and result.count == 3


def test_one_payload_and_many_equal_ones_are_their_own_mean_to_the_bit() -> None:
    for count in (1, 2, 5):
        result = pooled(*[(up(1), 3.0 + count)] * count).only
        assert torch.equal(result.x, up(1).x) and result.share == up(1).share


def test_a_sum_ignores_weights_and_each_keeps_apart_in_order() -> None:
    parts = [SumUp(torch.full((2,), float(number))) for number in (1, 2, 4)]
    assert pooled(*((part, 9.0 * n + 1) for n, part in enumerate(parts))).only.x.tolist() == [7, 7]
    kept = [EachUp(torch.tensor([float(number)])) for number in (3, 1, 2)]
    result = pooled(*((part, 1.0) for part in kept))
    assert [each.x.item() for each in result.payloads] == [3, 1, 2]
    assert result.weights == (1.0, 1.0, 1.0)


def test_pooling_leaves_the_payloads_alone() -> None:
    first, second = up(1), up(2)
    pooled((first, 1.0), (second, 1.0))
    assert torch.equal(first.x, up(1).x) and torch.equal(second.x, up(2).x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name_and_leaves_the_pool_alone(bad: float) -> None:
    pool: Pool[Any] = Pool()
    pool.add(up(1), 1.0)
    wrong = up(2)
    wrong.named["a"][1, 1] = bad
    with pytest.raises(NotFinite, match=r"named\[a\] holds NaN or infinity"):
        pool.add(wrong, 1.0)
    for weight in (bad, 0.0, -1.0):
        with pytest.raises(NotFinite, match=r"weight .*: must be positive and finite"):
            pool.add(up(2), weight)
    assert len(pool) == 1 and torch.equal(pool.result().only.x, up(1).x)
    assert nonfinite(up(1)) is None
