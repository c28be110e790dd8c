"""How much each layer's output changes when noise is added to the input of the first.

    x̃ = x + ε, with random signs and ‖ε_v‖ = ρ ‖x_v‖ for every vector v of the input (a token's hidden state)
    I_l = mean over examples of ‖h_l(x̃) − h_l(x)‖ / ‖h_l(x)‖, padding left out

Two forward passes over the examples, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.layer_outputs import observing_outputs


@torch.no_grad()
def sensitivities(
    task: Task, first: nn.Module, layers: Sequence[nn.Module], data: Examples, noise: float, batch_size: int, key: Key
) -> tuple[Tensor, float]:
    """Measure ``task.model`` as it stands; dropout is off.

    Args:
        task: model and objective.
        first: the module that gets the noise; its first argument is a tensor of examples.
        layers: the L modules with the outputs that are compared.
        data: at least one example.
        noise: ρ, above 0.
        batch_size: examples at a time.
        key: draws the signs; the same for clients that are to have the same noise.

    Returns:
        I_l, fp64, on the CPU, shape (L,); and the mean loss over the batches without noise.
    """
    task.model.eval()
    total = torch.zeros(len(layers), dtype=torch.float64)
    losses, examples = [], 0
    for number, batch in enumerate(data.batches(batch_size, None)):
        clean, noisy = dict[int, Tensor](), dict[int, Tensor]()
        with observing_outputs(layers, clean.__setitem__):
            losses.append(float(task.objective.loss(task.model, batch)))
        with observing_outputs(layers, noisy.__setitem__), _noise(first, noise, key.fold(number)):
            task.objective.loss(task.model, batch)
        mask = getattr(batch, "attention_mask", None)
        changes = [_relative_change(clean[layer], noisy[layer], mask) for layer in range(len(layers))]
        total += torch.stack([each.sum() for each in changes])
        examples += len(changes[0])
    return total / examples, sum(losses) / len(losses)


@contextmanager
def _noise(first: nn.Module, noise: float, key: Key) -> Iterator[None]:
    """Within this context, ``first`` reads its input with noise."""

    def change(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if given:
            return (_with_noise(given[0], noise, key), *given[1:]), named
        return given, {**named, "hidden_states": _with_noise(named["hidden_states"], noise, key)}

    hook = first.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _with_noise(input: Tensor, noise: float, key: Key) -> Tensor:
    signs = 1 - 2 * (key.bits(input.numel()) & 1)
    size: Tensor = torch.linalg.vector_norm(input, dim=-1, keepdim=True) * (noise / input.shape[-1] ** 0.5)
    return input + size * signs.to(input.device, input.dtype).view_as(input)


def _relative_change(clean: Tensor, noisy: Tensor, mask: Tensor | None) -> Tensor:
    """Of each example, fp64, on the CPU, shape (B,)."""
    before = clean.cpu().double()
    change = noisy.cpu().double() - before
    if mask is not None and mask.shape == before.shape[:2]:
        before, change = (each * mask.cpu()[:, :, None] for each in (before, change))
    before_B, change_B = (torch.linalg.vector_norm(each.flatten(1), dim=1) for each in (before, change))
    relative_B: Tensor = change_B / before_B.clamp(min=torch.finfo(torch.float32).tiny)
    return relative_B
