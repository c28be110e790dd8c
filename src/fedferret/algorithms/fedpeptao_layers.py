"""Which layers FedPepTAO shares: what a client measures, and how the server chooses."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local import lanczos
from fedferret.local.first_order import TrainingRefused
from fedferret.local.similarity import SHIFT, scored
from fedferret.models import adapters
from fedferret.models.adapters.attention import prefix_groups
from fedferret.models.layers import layers_of


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The block around each attention layer with a prefix.

    Args:
        model: with prefixes, on any device.

    Returns:
        One module per attention layer, in the order of ``prefix_groups``.

    Raises:
        UserError: an attention layer lies in no block.
    """
    blocks, found = layers_of(model), []
    for layer in prefix_groups(name for name, _ in model.named_parameters()):
        inside = [block for name, block in blocks.items() if f"{layer}.".startswith(f"{name}.")]
        if not inside:
            raise UserError(f"the attention layer {layer} lies in no block of the model: set layers=1.0")
        found.append(inside[0])
    return found


def measured(
    task: Task, data: Examples, key: Key, examples: int, lanczos_steps: int | None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """A client's work in the scoring round, on one batch.

    Args:
        task: its model has the public weights.
        data: the client's examples.
        key: draws the batch, and the start vector of Lanczos.
        examples: of the batch, where the client holds so many.
        lanczos_steps: None where the share of layers is not measured.

    Returns:
        The scores of all layers but the last, fp32, shape (L - 1,); the share of layers to keep, fp32, shape (1,), or
        (0,) where it is not measured; and metrics: the batch's loss without prefixes, and seconds.

    Raises:
        TrainingRefused: the client has no examples.
    """
    started = time.perf_counter()
    if not len(data):
        raise TrainingRefused("the client holds no example")
    if len(data) < 2:
        raise TrainingRefused("the client holds one example, by which every layer has the same score: it cannot score")
    rows = key.fold("examples").sample(range(len(data)), examples)
    batch = next(iter(data.take(rows).batches(examples, None)))  # in this order no rows are packed
    scores, loss = layer_scores(task, batch)
    share = [] if lanczos_steps is None else [share_to_keep(task, batch, key.fold("start"), lanczos_steps)]
    metrics = {"loss": loss, "seconds": time.perf_counter() - started}
    return scores, torch.tensor(share, dtype=torch.float32), metrics


def layer_scores(task: Task, batch: Any) -> tuple[Tensor, float]:
    """Score all layers but the last on one batch, without prefixes.

    Args:
        task: its model has the weights to score.
        batch: of B examples, none of them packed.

    Returns:
        ζ of each layer, fp32, shape (L - 1,), and the batch's loss.
    """
    model = task.model
    with torch.no_grad(), adapters.without_prefixes(model):
        blocks = blocks_of(model)[:-1]
        with scored(blocks, getattr(batch, "attention_mask", None)) as scores:
            loss = float(task.objective.loss(model, batch))
    return torch.tensor([scores[place] for place in range(len(blocks))], dtype=torch.float32), loss


def in_range(scores: Tensor, examples: int) -> bool:
    """Whether a batch of at most so many examples can have such scores: each eigenvalue adds from 1 to 1e5."""
    return all(1 - 1e-3 <= score <= examples / SHIFT for score in scores.tolist())


def share_to_keep(task: Task, batch: Any, key: Key, steps: int) -> float:
    """Measure the share of layers to keep: the plateau of the spectrum of the loss's Hessian in the prefixes.

    Args:
        task: its model has the weights at which the Hessian is taken.
        batch: of examples.
        key: draws the start vector.
        steps: of Lanczos.

    Returns:
        From 0 to 1.
    """
    names = [name for group in prefix_groups(dict(task.model.named_parameters())).values() for name in group]
    weights = {name: task.model.get_parameter(name) for name in names}
    product = lanczos.hessian_product(lambda: task.objective.loss(task.model, batch), weights)
    size = sum(weight.numel() for weight in weights.values())
    return lanczos.plateau(lanczos.spectrum(product, size, key, steps).above)


def rounded_count(share: float, layers: int) -> int:
    """The number of layers nearest to a share of all; of two, the larger."""
    return math.floor(share * layers + 0.5)


def choice(scores: Sequence[float], count: int, keep: Literal["highest", "lowest"]) -> Tensor:
    """Choose layers by their scores.

    Args:
        scores: of all layers but the last, which is chosen last. Of equal scores the earlier layer comes first.
        count: layers to choose, from 1 to L.
        keep: whether high scores or low ones are chosen.

    Returns:
        1 for a chosen layer and 0 for another, uint8, shape (L,).
    """
    sign = -1 if keep == "highest" else 1
    order = [*sorted(range(len(scores)), key=lambda layer: sign * scores[layer]), len(scores)]
    chosen = torch.zeros(len(scores) + 1, dtype=torch.uint8)
    chosen[order[:count]] = 1
    return chosen
