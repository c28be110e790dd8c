"""A gate for each intermediate neuron and each attention head of a frozen transformer, open or closed.

    margin     q_i = 1 - s_i                  the scale-free form of mean |w_i| - τ_i, with τ_i = s_i mean |w_i|
    gate       M_i = 1 where q_i > 0, else 0, before the projection that reads neuron i or head i
    backward   dL/dq_i = S(q_i) dL/dM_i       as in ``row_thresholds.py``

Closing a neuron closes its rows of the gate and up projections together, and closing a head closes all that the head
makes. Both are closed where they are read: the input of the layer's down or output projection. Merging sets the columns
that read closed ones to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from fedferret.models.adapters.row_thresholds import Step, Window
from fedferret.models.classifiers import inner_transformer
from fedferret.models.layers import layers_of

Gated: TypeAlias = Literal["neurons-and-heads", "neurons", "heads"]
GATE = "gate_threshold"  # a module's parameter, shape (G,)

# ends of the names of the projections that read neurons and heads
_READERS = (
    ("mlp.down_proj", "self_attn.o_proj"),  # Llama, Qwen, Mistral, Gemma, Phi-3
    ("mlp.c_proj", "attn.c_proj"),  # GPT-2
    ("mlp.dense_4h_to_h", "attention.dense"),  # GPT-NeoX
    ("fc2", "self_attn.out_proj"),  # OPT
    ("output.dense", "attention.output.dense"),  # BERT, RoBERTa, ELECTRA
    ("ffn.lin2", "attention.out_lin"),  # DistilBERT
)


@dataclass(frozen=True, kw_only=True)
class Gates(Adapter):
    """Gates in place, over a frozen model; the model's class stays what it was.

    Attributes:
        of: what has gates.
        window: of the straight-through gradient.
        initial: every s at first; a gate is closed where s is at least 1.
    """

    merges: ClassVar[bool] = True
    of: Gated = "neurons-and-heads"
    window: Window = "unit"
    initial: float = 0.0

    def export(self, model: nn.Module, base: str, folder: Path, classes: Sequence[str] = ()) -> str:
        """Refused: no other program reads gates alone."""
        raise UserError("no other program reads gates alone: they are merged into the model; use --to")

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        readers = _readers(model, self.of)
        model.requires_grad_(False)
        for name, count in readers.items():
            module: Any = model.get_submodule(name)
            first = torch.full((count,), float(self.initial), device=module.weight.device)
            module.register_parameter(GATE, nn.Parameter(first))
            module.gate_hook = module.register_forward_pre_hook(partial(_gated, self.window))
        return model

    @torch.no_grad()
    def _merge(self, model: nn.Module) -> nn.Module:
        for name, module in gated_modules(model).items():
            if not module.weight.is_floating_point():
                raise UserError(
                    f"the weights of {name} are quantised, and merging would round them again: merge into the "
                    f"checkpoint in full precision, as `fedferret export` does"
                )
            linear = isinstance(module, nn.Linear)
            inputs = module.weight.shape[1] if linear else module.weight.shape[0]  # GPT-2's Conv1D is transposed
            closed = (gate_mask(module) == 0).repeat_interleave(inputs // len(getattr(module, GATE)))
            (module.weight.T if linear else module.weight)[closed] = 0
        return self._detach(model)

    def _detach(self, model: nn.Module) -> nn.Module:
        for module in gated_modules(model).values():
            module.gate_hook.remove()
            for part in ("gate_hook", GATE):
                delattr(module, part)
        return model


def gated_modules(model: nn.Module) -> dict[str, Any]:
    """The projections with gates before them.

    Args:
        model: what ``Gates.attach`` returned.

    Returns:
        Modules by full name, in the model's order.
    """
    return {name: module for name, module in model.named_modules() if hasattr(module, GATE)}


def gate_mask(module: Any, window: Window = "unit") -> Tensor:
    """Which gates of a module are open.

    Args:
        module: of those that ``gated_modules`` gives.
        window: of the straight-through gradient.

    Returns:
        1 for an open gate, 0 for a closed one, shape (G,), with a gradient.
    """
    mask_G: Tensor = Step.apply(1 - getattr(module, GATE), window)  # type: ignore[no-untyped-call]
    return mask_G


@torch.no_grad()
def gate_masks(model: nn.Module) -> dict[str, Tensor]:
    """All gates.

    Args:
        model: what ``Gates.attach`` returned.

    Returns:
        1 for an open gate, 0 for a closed one, by the name of the gates' parameter.
    """
    return {f"{name}.{GATE}": gate_mask(module) for name, module in gated_modules(model).items()}


@torch.no_grad()
def open_share(model: nn.Module) -> float:
    """The share of weights behind open gates.

    Args:
        model: what ``Gates.attach`` returned.

    Returns:
        Columns of the gated projections that read open gates, weighted by their weights, over all columns.
    """
    sizes: dict[str, int] = {name: module.weight.numel() for name, module in gated_modules(model).items()}
    masks = gate_masks(model)
    kept = sum(size * float(masks[f"{name}.{GATE}"].mean()) for name, size in sizes.items())
    return kept / sum(sizes.values())


def _gated(window: Window, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: what the projection reads, or 0."""
    hidden, *rest = inputs
    mask_G = gate_mask(module, window)
    mask = mask_G.repeat_interleave(hidden.shape[-1] // len(mask_G))
    return (hidden * mask.to(hidden.dtype), *rest)


def _readers(model: nn.Module, of: Gated) -> dict[str, int]:
    """The projections to be gated, by name, with their numbers of gates. Raises UserError."""
    inner = inner_transformer(model)[1]
    config: Any = getattr(inner, "config", None)
    kind = getattr(config, "model_type", type(inner).__name__)
    layers = len(layers_of(model)) if config is not None else 0
    names = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for neurons, heads in _READERS:
        reading = selected(names, (heads,))[0]
        others = [name for name in selected(names, (neurons,))[0] if name not in reading]
        if not layers or (len(reading), len(others)) != (layers, layers):
            continue
        units = {name: int(config.num_attention_heads) for name in reading if of != "neurons"}
        units |= {name: _inputs(model.get_submodule(name)) for name in others if of != "heads"}
        return {name: units[name] for name in names if name in units}
    raise UserError(
        f"{kind} has no projection behind each layer's neurons and heads that is known here; known are those of Llama, "
        f"Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, OPT, BERT, RoBERTa, DistilBERT and models built like these"
    )


def _inputs(module: Any) -> int:
    """Width of what a linear module or GPT-2's ``Conv1D`` reads; quantised weights are packed."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0])
