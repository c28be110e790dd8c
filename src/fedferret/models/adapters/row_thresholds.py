"""A threshold for each row of a weight, below which the row is masked whole (Kim et al., arXiv 2406.00431).

    margin     q_i = mean_j |w_ij| - τ_i
    mask       M_i = 1 where q_i > 0, else 0
    output     y_i = M_i (w_i x + b_i)              a row is a neuron of a linear module or a filter of a convolution
    backward   dL/dq_i = S(q_i) dL/dM_i             a straight-through gradient within a window S:

        "all"       S = 1
        "unit"      S = 1 where |q| <= 1
        "inverted"  S = 1 where |q| > 1, as SpaFL's published code for CIFAR has it

So dL/dτ_i = -S(q_i) Σ_j G_ij w_ij with G the gradient of the masked weights, and through mean |w| the weights get
S(q_i) sign(w_ij) / n Σ_k G_ik w_ik beside G_ij M_i. A row's output is masked, which is the same as masking its weights
and its bias: a masked row gives 0 whatever its input, so it can be removed. The bias is no part of the margin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models.adapters.interface import Adapter
from fedferret.models.adapters.modules import selected

Window: TypeAlias = Literal["all", "unit", "inverted"]
THRESHOLD = "row_threshold"  # a module's parameter, shape (R,)


class Step(torch.autograd.Function):
    """1 where a margin is above 0, else 0; backward as the module's docstring says."""

    @staticmethod
    def forward(ctx: Any, margin_R: Tensor, window: Window) -> Tensor:
        """The mask."""
        ctx.window = window
        ctx.save_for_backward(margin_R)
        return (margin_R > 0).to(margin_R.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_R: Tensor) -> tuple[Tensor, None]:
        """The gradient where the margin lies in the window."""
        (margin_R,) = ctx.saved_tensors
        if ctx.window == "all":
            return gradient_R, None
        inside = margin_R.abs() <= 1
        return gradient_R * (inside if ctx.window == "unit" else ~inside), None


@dataclass(frozen=True, kw_only=True)
class RowThresholds(Adapter):
    """A threshold for each row of linear modules and convolutions, in place. The weights stay trainable.

    Attributes:
        window: of the straight-through gradient.
        initial: every threshold's first value; a row is masked where its mean magnitude is not above it.
        modules: ends of names, one pattern for a whole name, or None for all.
        head: whether the output layer is masked too.
    """

    merges: ClassVar[bool] = True
    window: Window = "unit"
    initial: float = 0.0
    modules: str | Sequence[str] | None = None
    head: bool = False

    def export(self, model: nn.Module, base: str, folder: Path, classes: Sequence[str] = ()) -> str:
        """Refused: thresholds mean nothing without the weights that they are compared with."""
        raise UserError("thresholds are of no use without their client's weights: export the client's model (--to)")

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        for name in self._chosen(model):
            module: Any = model.get_submodule(name)
            first = torch.full((len(module.weight),), float(self.initial), device=module.weight.device)
            module.register_parameter(THRESHOLD, nn.Parameter(first))
            module.threshold_hook = module.register_forward_hook(partial(_masked, self.window))
        return model

    def _chosen(self, model: nn.Module) -> list[str]:
        """Names of modules. Raises UserError."""
        left = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None and not self.head:
            left.add(id(head.weight))
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and id(module.weight) not in left
        ]
        if not names:
            raise UserError("this model has no linear module or convolution of which rows could be masked")
        chosen, missing = (names, []) if self.modules is None else selected(names, self.modules)
        if missing:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise UserError(
                f'algorithm.modules="{missing[0]}": no linear module or convolution is called so; this model has '
                f"{known}"
            )
        return chosen

    @torch.no_grad()
    def _merge(self, model: nn.Module) -> nn.Module:
        for module in masked_modules(model).values():
            masked_R = row_mask(module) == 0
            for weight in (module.weight, module.bias):
                if weight is not None:
                    weight[masked_R] = 0
        return self._detach(model)

    def _detach(self, model: nn.Module) -> nn.Module:
        for module in masked_modules(model).values():
            module.threshold_hook.remove()
            for part in ("threshold_hook", THRESHOLD):
                delattr(module, part)
        return model


def masked_modules(model: nn.Module) -> dict[str, Any]:
    """The modules with thresholds.

    Args:
        model: what ``RowThresholds.attach`` returned.

    Returns:
        Modules by full name, in the model's order.
    """
    return {name: module for name, module in model.named_modules() if hasattr(module, THRESHOLD)}


def row_mask(module: Any, window: Window = "unit") -> Tensor:
    """Which rows of a module are kept.

    Args:
        module: of those that ``masked_modules`` gives.
        window: of the straight-through gradient.

    Returns:
        1 for a row that is kept, 0 for one that is masked, shape (R,), with a gradient.
    """
    margin_R = module.weight.float().flatten(1).abs().mean(dim=1) - getattr(module, THRESHOLD)
    mask_R: Tensor = Step.apply(margin_R, window)  # type: ignore[no-untyped-call]
    return mask_R


@torch.no_grad()
def row_masks(model: nn.Module) -> dict[str, Tensor]:
    """All masks.

    Args:
        model: what ``RowThresholds.attach`` returned.

    Returns:
        1 for a row that is kept, 0 for one that is masked, by the name of the rows' thresholds.
    """
    modules = masked_modules(model).items()
    return {f"{name}.{THRESHOLD}".removeprefix("."): row_mask(module) for name, module in modules}


@torch.no_grad()
def density(model: nn.Module) -> float:
    """The share of weights that is kept.

    Args:
        model: what ``RowThresholds.attach`` returned.

    Returns:
        Weights and biases in rows that are kept, over those in all rows of modules with thresholds.
    """
    kept = total = 0.0
    for module in masked_modules(model).values():
        size = sum(weight.numel() for weight in (module.weight, module.bias) if weight is not None)
        kept, total = kept + size * row_mask(module).mean().item(), total + size
    return kept / total


def threshold_names(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pair thresholds with the weights that they are compared with.

    Args:
        names: of a model's parameters.

    Yields:
        The name of each threshold, and of its weight.
    """
    for name in names:
        module, _, part = name.rpartition(".")
        if part == THRESHOLD:
            yield name, f"{module}.weight" if module else "weight"


def _masked(window: Window, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: the rows' outputs, or 0."""
    mask_R = row_mask(module, window).to(output.dtype)
    return output * (mask_R[:, None, None] if isinstance(module, nn.Conv2d) else mask_R)
