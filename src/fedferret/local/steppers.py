"""How gradients become steps: all at once after the backward pass, or each as it is produced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from types import TracebackType
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fedferret.core.messages import state

Adjust: TypeAlias = Callable[[Mapping[str, nn.Parameter]], None]  # between backward and step; may change gradients


@state
class OptimizerState:
    """An optimiser's memory by parameter and part ("momentum_buffer", "exp_avg", ...); empty before the first step."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Stepper(Protocol):
    """A context in which backward passes happen; ``step`` ends one optimiser step."""

    def __enter__(self) -> Stepper: ...
    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def use_rate(self, rate: float) -> None:
        """Set the learning rate of the steps that follow.

        Args:
            rate: the step per unit of gradient, above 0.
        """
        ...

    def step(self) -> None:
        """End one optimiser step: apply the gradients that are left, then drop the gradients."""
        ...

    def state(self) -> OptimizerState:
        """Save the optimiser's memory.

        Returns:
            A copy, by parameter and part; empty where the optimiser has no memory.
        """
        ...


class StepAfterBackward:
    """Gradients collect in a buffer of the model's size; adjust, clip, optimiser, in this order.

    A mask gates the gradient before it is clipped, the weight decay and the optimiser's moments, so that masked values
    stay as they are to the bit.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        adjust: Adjust | None = None,
        mask: Mapping[str, Tensor] | None = None,
        state: OptimizerState | None = None,
    ) -> None:
        """Put the optimiser into the state in which it was left, if any.

        Args:
            weights: leaves that require gradients, by name.
            optimizer: over these weights, new.
            clip: greatest Euclidean norm of all gradients together; None: not clipped.
            adjust: changes gradients in place, before clipping.
            mask: zeros and ones of the weights' shapes, by name; a weight that is not named is not masked.
            state: of the optimiser after earlier steps.
        """
        self._weights, self._optimizer, self._clip, self._adjust = weights, optimizer, clip, adjust
        self._mask = {name: each.to(weights[name].device) for name, each in (mask or {}).items()}
        self._decay = optimizer.param_groups[0]["weight_decay"] if self._mask else 0.0
        if self._decay:  # decay is applied here, where the mask gates it
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
        if state is not None:
            self._restore(state)

    def __enter__(self) -> StepAfterBackward:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def use_rate(self, rate: float) -> None:
        """Set the optimiser's learning rate, which scales weight decay too.

        Args:
            rate: as in ``Stepper.use_rate``.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        """Use the gradients and drop them."""
        if self._adjust is not None:
            self._adjust(self._weights)
        self._gate_gradients()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._weights.values(), self._clip)
        if self._decay:
            self._decay_weights()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> OptimizerState:
        """Save the optimiser's memory.

        Returns:
            A copy; parameters for which the optimiser has no memory are left out.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, weight in self._weights.items():
            known = self._optimizer.state.get(weight, {})
            parts[name] = {part: _as_tensor(value).clone() for part, value in known.items() if value is not None}
        return OptimizerState({name: part for name, part in parts.items() if part})

    def _restore(self, state: OptimizerState) -> None:
        for name, weight in self._weights.items():
            for part, value in state.parts.get(name, {}).items():
                restored = value.clone() if value.dim() == 0 else value.to(weight.device, copy=True)
                if name in self._mask and value.shape == weight.shape:
                    restored.mul_(self._mask[name])
                self._optimizer.state[weight][part] = restored

    @torch.no_grad()
    def _gate_gradients(self) -> None:
        for name, mask in self._mask.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.mul_(mask)

    @torch.no_grad()
    def _decay_weights(self) -> None:
        """As the optimiser would: AdamW shrinks the weight before its step, SGD adds to the gradient after the clip."""
        rate = self._optimizer.param_groups[0]["lr"]
        for name, weight in self._weights.items():
            mask = self._mask.get(name)
            if isinstance(self._optimizer, torch.optim.AdamW):
                shrunk = weight * (1 - rate * self._decay)
                weight.copy_(shrunk if mask is None else torch.where(mask != 0, shrunk, weight))
            elif weight.grad is not None:
                weight.grad.add_(weight if mask is None else weight * mask, alpha=self._decay)


class StepInBackward:
    """Plain SGD without a gradient buffer: w <- w - lr g the moment that autograd has all of g."""

    def __init__(self, weights: Sequence[nn.Parameter], learning_rate: float) -> None:
        """Place no hook yet.

        Args:
            weights: leaves that require gradients; tied ones once.
            learning_rate: the step per unit of gradient.
        """
        self._weights, self._learning_rate = weights, learning_rate
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> StepInBackward:
        # a tied weight is one leaf, and autograd sums all gradients of the leaf before it calls this hook
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self.apply)  # type: ignore[no-untyped-call]
            for weight in self._weights
        ]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            weight.grad = None

    def apply(self, weight: Tensor) -> None:
        """Step one weight.

        Args:
            weight: with all of its gradient, which is dropped.
        """
        assert weight.grad is not None
        with torch.no_grad():
            weight.add_(weight.grad, alpha=-self._learning_rate)
        weight.grad = None

    def use_rate(self, rate: float) -> None:
        """Set the rate before the backward pass.

        Args:
            rate: as in ``Stepper.use_rate``.
        """
        self._learning_rate = rate

    def step(self) -> None:
        """Nothing is left to do."""

    def state(self) -> OptimizerState:
        """Plain SGD has no memory.

        Returns:
            An empty state.
        """
        return OptimizerState()


def _as_tensor(value: Tensor | float) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value)
