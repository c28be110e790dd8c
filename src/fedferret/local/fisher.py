"""Fisher information of single examples, and masks of the neurons that have most of it.

    g_i = gradient of example i's own loss        of example i:  f_i = Σ g_i², the trace of the empirical Fisher matrix
                                                  of a neuron:   Σ over its row of the mean over i of g_i²

Gradients are of one example each: the square of a batch's gradient is another number. Examples of one shape go through
``torch.func.vmap`` together; a model or an objective that it cannot follow has one backward pass per example, with the
same gradients up to rounding. Memory: the gradients of at most 8 examples, and of fewer where these would be more than
2^25 values (128 MiB).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedferret.core.task import Examples, Objective, Task
from fedferret.local.curriculum import part_of

_EXAMPLES, _VALUES = 8, 1 << 25  # held at once: a batch's activations, and what a small machine has room for
Gradients = dict[str, Tensor]  # by parameter, shape (B, *the parameter's)


@dataclass(frozen=True)
class Fisher:
    """The diagonal of the empirical Fisher matrix, summed in two ways.

    Attributes:
        by_example: f_i, fp64, shape (N,); infinite for an example without a finite gradient, which is hardest.
        by_neuron: by parameter, one value per row of the parameter, fp32; examples that are not finite add nothing.
    """

    by_example: Tensor
    by_neuron: dict[str, Tensor]


def fisher(task: Task, data: Examples, names: Iterable[str], at_once: int | None = None) -> Fisher:
    """Measure the Fisher information of ``task.model`` as it stands; dropout is off.

    Args:
        task: model and objective.
        data: N examples, at least one.
        names: parameters that count; each has at least one dimension.
        at_once: examples with gradients that are held together; None: as many as fit.

    Returns:
        The sums over the named parameters, on the CPU.
    """
    task.model.eval()
    by_example = torch.zeros(len(data), dtype=torch.float64)
    weights = {name: task.model.get_parameter(name) for name in names}
    rows = {name: torch.zeros(len(weight), dtype=torch.float64) for name, weight in weights.items()}
    fitting = max(1, min(_EXAMPLES, _VALUES // max(1, sum(weight.numel() for weight in weights.values()))))
    for places, gradients in gradients_by_example(task, data, weights, at_once or fitting):
        squares = {}
        for name, each in gradients.items():
            squares_BR = each.square().flatten(2).sum(2) if each.dim() > 2 else each.square()
            squares[name] = squares_BR.cpu().double()
            by_example[places] += squares[name].sum(1)
        finite = by_example[places].isfinite()
        for name, squares_BR in squares.items():
            rows[name] += squares_BR[finite].sum(0)
    by_example.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    return Fisher(by_example, {name: (total / len(data)).float() for name, total in rows.items()})


def gradients_by_example(
    task: Task, data: Examples, weights: Mapping[str, nn.Parameter], at_once: int
) -> Iterator[tuple[list[int], Gradients]]:
    """The gradient of each example's own loss.

    Args:
        task: model and objective.
        data: the examples.
        weights: of the model, by name.
        at_once: examples with gradients that are held together.

    Yields:
        Numbers of at most ``at_once`` examples with their gradients; every example once. Those of an example without
        a target are NaN.
    """
    loss = _Loss(task.model, task.objective)
    followed = True  # by vmap, until it is not
    for start in range(0, len(data), at_once):
        part = data.take(range(start, min(start + at_once, len(data))))
        singles = [next(iter(part.take([row]).batches(1, None))) for row in range(len(part))]
        for rows in _alike(singles):
            batches, found = [singles[row] for row in rows], None
            if followed and len(rows) > 1:
                try:
                    found = _together(loss, weights, batches)
                except RuntimeError:  # a shape or a branch that depends on values
                    followed = False
            if found is None:
                found = _one_by_one(loss, weights, batches)
            yield [start + row for row in rows], found


def neuron_masks(scores: Mapping[str, Tensor], kept: float) -> dict[str, Tensor]:
    """Select the rows of each parameter with the highest scores.

    Args:
        scores: by parameter, one value per row.
        kept: share of the rows, rounded up.

    Returns:
        By parameter, uint8, 1 for a row that trains; all rows where all scores are 0, since these say nothing.
    """
    masks = {}
    for name, each in scores.items():
        chosen = each.cpu().double().argsort(descending=True, stable=True)[: part_of(len(each), kept)]
        masks[name] = torch.zeros(len(each), dtype=torch.uint8)
        masks[name][chosen if each.any() else slice(None)] = 1
    return masks


class _Loss(nn.Module):
    """An objective's loss as a module's output, which ``functional_call`` needs."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self._objective = model, objective

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self._objective.loss(self.model, batch)


def _alike(batches: list[Any]) -> list[list[int]]:
    """Places of batches that can be stacked: dataclasses with tensors of the same shapes."""
    groups: dict[Any, list[int]] = {}
    for place, batch in enumerate(batches):
        form: Any = place
        if dataclasses.is_dataclass(batch):
            values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
            form = tuple((each.dtype, each.shape) if isinstance(each, Tensor) else each for each in values)
        groups.setdefault(form, []).append(place)
    return list(groups.values())


def _together(loss: _Loss, weights: Mapping[str, nn.Parameter], batches: list[Any]) -> Gradients | None:
    """Gradients by vmap. What is equal in all batches, such as a mask, is not mapped over; None where all is equal."""
    first = batches[0]
    parts = {field.name: [getattr(each, field.name) for each in batches] for field in dataclasses.fields(first)}
    mapped = {
        name: torch.stack(values)
        for name, values in parts.items()
        if isinstance(values[0], Tensor) and not all(torch.equal(values[0], each) for each in values)
    }
    if not mapped:
        return None

    def of_one(values: dict[str, Tensor], own: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(loss, values, (dataclasses.replace(first, **own),))
        return result

    held = {f"model.{name}": weight.detach() for name, weight in weights.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that vmap does one by one
        found = vmap(grad(of_one), in_dims=(None, 0))(held, mapped)
    return {name: found[f"model.{name}"] for name in weights}


def _one_by_one(loss: _Loss, weights: Mapping[str, nn.Parameter], batches: list[Any]) -> Gradients:
    """Gradients by one backward pass per batch."""
    each = [torch.autograd.grad(loss(batch), list(weights.values()), materialize_grads=True) for batch in batches]
    return {name: torch.stack(values) for name, values in zip(weights, zip(*each, strict=True), strict=True)}
