"""What methods that tune all weights share: the public weights, the model that holds them, a client's change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias

from torch import Tensor, nn

from fedferret.core import tree
from fedferret.core.algorithm import Examples, Task

Weighting: TypeAlias = Literal["examples", "equal"]


class UpdateRefused(RuntimeError):
    """A client's update that holds NaN or infinity; names the tensor."""


@contextmanager
def loaded(task: Task, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The task's model with these weights in it."""
    tree.copy_(tree.parameters(task.model), weights)
    yield task.model


def change(before: Mapping[str, Tensor], after: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The pairs (name, before - after) of a client's training, fp32. Raises UpdateRefused."""
    for name, delta in tree.difference(before, tree.parameters(after)):
        # NaN and infinity survive into the sum, which needs no mask of the tensor's size; there, large numbers overflow
        if not math.isfinite(float(delta.sum())) and not delta.isfinite().all():
            raise UpdateRefused(f"the update of {name} holds NaN or infinity: lower the learning rate")
        yield name, delta


def weight_of(data: Examples, weighting: Weighting) -> float:
    """A client's share in the mean."""
    return float(len(data)) if weighting == "examples" else 1.0
