"""Images per second of a sparse client's model: masked rows removed, against the same rows computed as zeros.

The rows that are masked are drawn: two thirds of every layer of the body. Logits are equal up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import Figure, alternate, main, seconds
from fedferret import models
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.models import adapters
from fedferret.models.pruning import without_zero_rows

MASKED, IMAGES = 2 / 3, 256


def figures() -> Iterator[Figure]:
    """For both image models in which layers follow one another."""
    for name in ("lenet5", "conv4"):
        masked = adapters.RowThresholds().attach(models.classifier(name, 10).model, Key.of(1))
        with torch.no_grad():
            for module in adapters.masked_modules(masked).values():
                module.row_threshold.copy_(module.weight.flatten(1).abs().mean(dim=1).quantile(MASKED))
        density = adapters.density(masked)
        dense = adapters.released(copy.deepcopy(masked))
        removed = without_zero_rows(dense)
        batch = SimpleNamespace(pixels=Key.of(2).uniform(IMAGES * 784).float().view(IMAGES, 1, 28, 28))
        torch.testing.assert_close(_logits(removed, batch), _logits(masked, batch), rtol=1e-4, atol=1e-4)
        ratio = alternate(
            seconds(lambda removed=removed, batch=batch: _logits(removed, batch)),  # type: ignore[misc]
            seconds(lambda dense=dense, batch=batch: _logits(dense, batch)),  # type: ignore[misc]
        )
        sizes = [f"{tree.size(dict(each.named_parameters())):,}" for each in (removed, dense)]
        note = f"density {density:.0%}; {sizes[0]} of {sizes[1]} weights are left; {IMAGES} images at a time"
        yield Figure(f"{name} without masked rows against {name} with zeros", ratio, "at most", 0.6, note)


@torch.no_grad()
def _logits(model: Any, batch: Any) -> torch.Tensor:
    logits: torch.Tensor = model(batch)
    return logits


if __name__ == "__main__":
    main("pruned", "Removing masked rows makes a sparse model faster.", figures)
