"""How gradients become steps: all at once after the backward pass, or each as it is produced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn


class Stepper(Protocol):
    """A context in which backward passes happen; ``step`` ends one optimiser step."""

    def __enter__(self) -> Stepper: ...
    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def step(self) -> None: ...


class StepAfterBackward:
    """Gradients collect in a buffer of the model's size; pull, clip, optimiser, in this order."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        anchor: Mapping[str, Tensor] | None,
        proximal: float,
    ) -> None:
        self._weights, self._optimizer, self._clip = weights, optimizer, clip
        self._anchor, self._proximal = anchor, proximal

    def __enter__(self) -> StepAfterBackward:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Use the gradients and drop them."""
        for name, weight in self._weights.items():
            if self._anchor is not None and weight.grad is not None:
                weight.grad.add_(weight.detach() - self._anchor[name].to(weight.device), alpha=self._proximal)
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._weights.values(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class StepInBackward:
    """Plain SGD without a gradient buffer: w <- w - lr g the moment that autograd has all of g."""

    def __init__(self, weights: Sequence[nn.Parameter], learning_rate: float) -> None:
        self._weights, self._learning_rate = weights, learning_rate
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> StepInBackward:
        # a tied weight is one leaf, and autograd sums all its gradients before this hook hears of them
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self._apply)  # type: ignore[no-untyped-call]
            for weight in self._weights
        ]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            weight.grad = None

    def _apply(self, weight: Tensor) -> None:
        assert weight.grad is not None
        with torch.no_grad():
            weight.add_(weight.grad, alpha=-self._learning_rate)
        weight.grad = None

    def step(self) -> None:
        """All is done."""


@contextmanager
def checkpointed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Within this context, ``model`` (a transformers model) recomputes activations in the backward pass."""
    model.eval()  # dropout off
    if not enabled:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})  # type: ignore[operator]
    model.train()  # transformers checkpoints in training mode only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]
        model.eval()
