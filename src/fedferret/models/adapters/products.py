"""Products of two factors added to linear modules, y = W x + B A x, W frozen; what A and B are made of is a subclass's.

The sum is in fp32 and rounded once to the output's dtype, whatever the base is held in. Merged: W <- W + B A. Exported:
peft's LoRA of α = r, since B A is what LoRA adds, however A and B came about.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models.adapters.interface import Adapter
from fedferret.models.adapters.lora import LoRA
from fedferret.models.adapters.modules import chosen_modules
from fedferret.models.classifiers import Classifier

_HOOK = "product_hook"


@dataclass(frozen=True, kw_only=True)
class Products(Adapter):
    """A low-rank update of linear modules, in place: the model's class stays what it was.

    Attributes:
        rank: r, at most a module's inputs and outputs.
        modules: as in ``LoRA``.
    """

    merges: ClassVar[bool] = True
    rank: int
    modules: str | Sequence[str] | None = None

    @abstractmethod
    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """What is added to one module.

        Args:
            module: with this adapter.

        Returns:
            A of shape (r, inputs) and B of shape (outputs, r), fp32, with gradients.
        """

    def export(self, model: nn.Module, base: str, folder: Path, classes: Sequence[str] = ()) -> str:
        """A LoRA adapter of peft's; ``PeftModel.from_pretrained(model, folder)`` reads it."""
        if isinstance(model, Classifier):
            raise UserError("a classifier's adapter is merged: plain peft has no place for it; use --to")
        tensors = dict[str, Tensor]()
        for name, module in tuned_modules(model).items():
            a, b = (factor.detach().clone() for factor in self.factors(module))
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        return LoRA(rank=self.rank, alpha=self.rank).write(model, base, folder, list(tuned_modules(model)), tensors)

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        modules = {name: model.get_submodule(name) for name in chosen_modules(model, self.modules)}
        for name, module in modules.items():
            if self.rank > (most := min(sizes(module))) > 1:
                raise UserError(
                    f"algorithm.rank={self.rank}: {name} has a side of {most}, and its update at most rank {most}; set "
                    f"rank={most} or less, or leave such modules out of modules"
                )
        model.requires_grad_(False)
        self._add(modules, key)
        for module in modules.values():
            setattr(module, _HOOK, module.register_forward_hook(partial(_with_product, self)))
        return model

    @abstractmethod
    def _add(self, modules: Mapping[str, nn.Module], key: Key) -> None:
        """Give modules what their factors are made of; on the meta device nothing is drawn."""

    @abstractmethod
    def _remove(self, module: nn.Module) -> None:
        """Take from a module what ``_add`` gave it."""

    @torch.no_grad()
    def _merge(self, model: nn.Module) -> nn.Module:
        for name, module in tuned_modules(model).items():
            weight: Any = module.weight
            if not weight.is_floating_point():
                raise UserError(
                    f"the weights of {name} are quantised, and merging would round them again: merge into the "
                    f"checkpoint in full precision, as `fedferret export` does"
                )
            a, b = self.factors(module)
            update = b.double() @ a.double()
            weight.copy_(weight.double() + (update if isinstance(module, nn.Linear) else update.T))
        return self._detach(model)

    def _detach(self, model: nn.Module) -> nn.Module:
        for module in tuned_modules(model).values():
            getattr(module, _HOOK).remove()
            delattr(module, _HOOK)
            self._remove(module)
        return model


def tuned_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a product.

    Args:
        model: with or without such an adapter.

    Returns:
        By full name, in the model's order.
    """
    return {name: module for name, module in model.named_modules() if hasattr(module, _HOOK)}


def sizes(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear module.

    Args:
        module: a linear module, its weights packed or not, or GPT-2's ``Conv1D``, which has its weight transposed.

    Returns:
        (outputs, inputs).
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    inputs, outputs = module.weight.shape
    return outputs, inputs


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weight is.

    Args:
        module: a linear module.

    Returns:
        Its device.
    """
    weight: Any = module.weight
    found: torch.device = weight.device
    return found


def _with_product(adapter: Products, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: output + B A x."""
    a, b = adapter.factors(module)
    return (output.float() + linear(linear(inputs[0].float(), a), b)).to(output.dtype)
