"""Normal numbers of a key, for rows and weights of tests."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fedferret.core.keys import Key


def normal(key: Key, *shape: int) -> Tensor:
    """Sums of twelve uniforms: normal to the eye, the same bits everywhere."""
    return _summed(key, int(torch.Size(shape).numel())).clone().view(shape)


@cache  # every test asks for the same rows and weights
def _summed(key: Key, count: int) -> Tensor:
    total = sum((key.fold(draw).uniform(count) for draw in range(12)), torch.full((count,), -6.0, dtype=torch.float64))
    return total.float()
