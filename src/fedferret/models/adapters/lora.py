"""LoRA by the peft library: y = W x + (α / r) B A x, W frozen (Hu et al., ICLR 2022, arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fedferret.core.keys import Key
from fedferret.models.adapters.drawing import draw, no_trace
from fedferret.models.adapters.interface import Adapter
from fedferret.models.adapters.modules import chosen_modules, read_as_given


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Low-rank updates of linear modules, in place: the model's class and its functions stay what they were.

    Attributes:
        rank: r.
        alpha: α; the update is scaled by α / r.
        modules: peft's ``target_modules``, for linear modules: the ends of their names, one pattern for a whole name,
            "all-linear" (the output head left out), or None for the architecture's default.
        freeze_a: the matrices A keep their first values.
    """

    merges: ClassVar[bool] = True
    rank: int
    alpha: int
    modules: str | Sequence[str] | None = None
    freeze_a: bool = False

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        import peft

        names = chosen_modules(model, self.modules)
        # each name in full: peft reads a list as ends of names, and would find others
        pattern = "|".join(re.escape(name) for name in names)
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=pattern)
        with no_trace(), read_as_given(model):
            peft.inject_adapter_in_model(config, model)
        draw(model, key)
        if self.freeze_a:
            for a, _ in factors(model).values():
                a.requires_grad_(False)
        return model

    def _merge(self, model: nn.Module) -> nn.Module:
        return _without_layers(model, merged=True)

    def _detach(self, model: nn.Module) -> nn.Module:
        return _without_layers(model, merged=False)


def factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The LoRA factors of a model.

    Args:
        model: what ``LoRA.attach`` returned.

    Returns:
        (A, B) by the full name of the module, shapes (r, inputs) and (outputs, r); the parameters themselves.
    """
    found = dict(model.named_parameters())
    return {
        name.removesuffix(".lora_A.default.weight"): (a, found[name.replace(".lora_A.", ".lora_B.")])
        for name, a in found.items()
        if name.endswith(".lora_A.default.weight")
    }


@torch.no_grad()
def _without_layers(model: nn.Module, merged: bool) -> nn.Module:
    """The plain architecture, in place, with the update added to the weights if ``merged``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if merged:
                layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    untyped: Any = model
    if hasattr(untyped, "peft_config"):
        del untyped.peft_config
    return model
