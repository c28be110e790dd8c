"""Local training of a model held in bf16: fp32 masters take the steps, the model's weights are the masters, rounded.

    m <- w, in fp32                      every step:   gradient at w, in bf16      m <- optimiser's step, in fp32
                                                       w <- m, rounded at random by (key, step, tensor's name)

A local step is often far below bf16's rounding step (10^-6 against 10^-4), so the update that a client sends is that of
the masters. That of the rounded weights has the same mean and the noise of a rounding in every weight, a hundred times
the update's energy. Rounding from the masters each time leaves the error of one rounding, however many steps there are.

Memory, per tuned weight: 2 bytes of the model and 4 of its master where an fp32 model has 4, while a client trains;
gradients are fp32 where they are held. Weights that are fp32 are their own masters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from fedferret.bases.stochastic_rounding import round_into_
from fedferret.core.keys import Key
from fedferret.local.steppers import OptimizerState, StepInBackward, Stepper


class Masters:
    """The weights that an optimiser changes.

    Attributes:
        weights: fp32 leaves by name, to be given to an optimiser: the model's own, or masters of bf16 ones.
    """

    def __init__(self, model: nn.Module, key: Key) -> None:
        """Copy what is bf16.

        Args:
            model: what is trained; parameters without ``requires_grad`` are left out.
            key: draws the roundings.
        """
        self._key = key
        self._own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights: dict[str, nn.Parameter] = {
            name: nn.Parameter(weight.detach().float()) if weight.dtype == torch.bfloat16 else weight
            for name, weight in self._own.items()
        }

    @property
    def rounded(self) -> Mapping[str, tuple[nn.Parameter, nn.Parameter]]:
        """The bf16 weights with their masters, by name."""
        pairs = ((name, (weight, self.weights[name])) for name, weight in self._own.items())
        return {name: (weight, master) for name, (weight, master) in pairs if weight is not master}

    def detached(self) -> dict[str, Tensor]:
        """The weights that training arrived at.

        Returns:
            Fp32 tensors by name, not copied.
        """
        return {name: weight.detach() for name, weight in self.weights.items()}

    def stepper(self, inner: Stepper) -> Stepper:
        """Let gradients of the model reach its masters, and what the masters become the model.

        Args:
            inner: takes the steps, on ``weights``.

        Returns:
            ``inner`` itself where every weight is its own master.
        """
        return _StepOnMasters(inner, self.rounded, self._key) if self.rounded else inner


class _StepOnMasters:
    """An inner stepper's steps, on masters."""

    def __init__(self, inner: Stepper, pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]], key: Key) -> None:
        self._inner, self._pairs, self._key = inner, pairs, key
        self._step = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _StepOnMasters:
        self._inner.__enter__()
        for name, (weight, _) in self._pairs.items():
            hook = weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda weight, name=name: self._take(name, weight)
            )
            self._hooks.append(hook)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for weight, master in self._pairs.values():
            weight.grad = master.grad = None
        self._inner.__exit__(kind, error, trace)

    @torch.no_grad()
    def _take(self, name: str, weight: nn.Parameter) -> None:
        """Move a gradient to the master; batches of a step add up in fp32."""
        master = self._pairs[name][1]
        assert weight.grad is not None
        wide = weight.grad.float()
        weight.grad = None
        master.grad = wide if master.grad is None else master.grad.add_(wide)
        if isinstance(self._inner, StepInBackward):
            self._inner.apply(master)
            self._round(name)

    def use_rate(self, rate: float) -> None:
        """Set the inner stepper's learning rate."""
        self._inner.use_rate(rate)

    def step(self) -> None:
        """End one optimiser step."""
        self._inner.step()
        if not isinstance(self._inner, StepInBackward):
            for name in self._pairs:
                self._round(name)
        self._step += 1

    def _round(self, name: str) -> None:
        weight, master = self._pairs[name]
        round_into_(weight, master, self._key.fold(self._step, name))

    def state(self) -> OptimizerState:
        """The inner stepper's, of the masters."""
        return self._inner.state()
