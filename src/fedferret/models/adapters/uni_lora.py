"""Uni-LoRA: all factors of LoRA read their values from one short vector (Li et al., arXiv 2506.00799).

    D = Σ r (inputs + outputs) values of all A and B, in the model's order, A before B
    value i = θ[place(i)] / √n[place(i)],  place = a drawn order of 0 .. D - 1, modulo the length of θ;  n[p]: its uses

The map from θ to the D values is an isometry. Each p is used ⌊D / len θ⌋ or one more times, as in peft: the paper draws
places one by one, and some may then never be used. θ is one parameter, under the name of the first tuned module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models.adapters.products import Products, device_of, sizes

VECTOR = "uni_lora_vector"  # of every tuned module, and the same parameter in all
_PLACES, _SCALES = ("uni_lora_places_a", "uni_lora_places_b"), ("uni_lora_scales_a", "uni_lora_scales_b")


@dataclass(frozen=True, kw_only=True)
class UniLoRA(Products):
    """LoRA factors from one vector.

    Attributes:
        values: length of θ.
        bound: θ is drawn uniformly from -bound to bound; both factors of every module are then other than zero.
    """

    values: int
    bound: float = 0.02

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """See ``Products``."""
        vector = module.get_parameter(VECTOR)
        a, b = (
            vector[module.get_buffer(places)] * module.get_buffer(scales)
            for places, scales in zip(_PLACES, _SCALES, strict=True)
        )
        return a, b

    def _add(self, modules: Mapping[str, nn.Module], key: Key) -> None:
        shapes = [shape for module in modules.values() for shape in _shapes(module, self.rank)]
        total = sum(rows * columns for rows, columns in shapes)
        if self.values > total:
            raise UserError(
                f"algorithm.values={self.values}: the factors have {total:,} values in all, so others would be of no "
                f"use; set values={total} or less, or raise rank"
            )
        device = device_of(next(iter(modules.values())))
        vector = nn.Parameter(torch.empty(self.values, device=device))
        if device.type == "meta":
            places, scales = (torch.empty(total, dtype=kind, device=device) for kind in (torch.long, torch.float32))
        else:
            drawn = key.fold("vector").uniform(self.values)
            vector.data.copy_(self.bound * (2 * drawn - 1))
            places = key.fold("places").order(total) % self.values
            scales = torch.bincount(places, minlength=self.values)[places].double().rsqrt().float()
        lengths = [rows * columns for rows, columns in shapes]
        parts = zip(
            torch.split(places.to(device), lengths), torch.split(scales.to(device), lengths), shapes, strict=True
        )
        for module in modules.values():
            module.register_parameter(VECTOR, vector)
            for names in zip(_PLACES, _SCALES, strict=True):
                *values, shape = next(parts)
                for name, value in zip(names, values, strict=True):
                    module.register_buffer(name, value.view(shape).clone(), persistent=False)

    def _remove(self, module: nn.Module) -> None:
        for name in (VECTOR, *_PLACES, *_SCALES):
            delattr(module, name)


def _shapes(module: nn.Module, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and of B."""
    outputs, inputs = sizes(module)
    return (rank, inputs), (outputs, rank)
