"""LoRA-XS and LoRA-SB: y = W x + B R A x, with W, B and A frozen and R of r x r tuned; R = 0 at first.

B and A are drawn here, uniform and so that columns of B and rows of A have length 1 in expectation; a method may
overwrite them. With orthonormal ones a gradient step on R is a step on W, projected: W - η B Bᵀ G Aᵀ A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedferret.core.keys import Key
from fedferret.models.adapters.products import Products, device_of, sizes

LATENT_R, LATENT_A, LATENT_B = ".latent_r", ".latent_a", ".latent_b"  # follow a module's name


@dataclass(frozen=True, kw_only=True)
class Latent(Products):
    """A tuned matrix between two frozen ones."""

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """A, and B R. See ``Products``."""
        a, b, r = (module.get_parameter(name[1:]) for name in (LATENT_A, LATENT_B, LATENT_R))
        return a, b @ r

    def _add(self, modules: Mapping[str, nn.Module], key: Key) -> None:
        for name, module in modules.items():
            outputs, inputs = sizes(module)
            device = device_of(module)
            for part, length, shape in (
                (LATENT_B, outputs, (outputs, self.rank)),
                (LATENT_A, inputs, (self.rank, inputs)),
            ):
                first = torch.empty(shape, device=device)
                if device.type != "meta":
                    first.copy_(unit_rows(length, self.rank, key.fold(name, part)).view(shape))
                module.register_parameter(part[1:], nn.Parameter(first, requires_grad=False))
            module.register_parameter(LATENT_R[1:], nn.Parameter(torch.zeros(self.rank, self.rank, device=device)))

    def _remove(self, module: nn.Module) -> None:
        for name in (LATENT_R, LATENT_A, LATENT_B):
            delattr(module, name[1:])


def unit_rows(length: int, count: int, key: Key) -> Tensor:
    """Draw directions with bits that depend on no matrix library.

    Args:
        length: of a direction.
        count: how many.
        key: draws them.

    Returns:
        Uniform values of variance 1 / length, float64, shape (count * length,): squared lengths are 1 in expectation.
    """
    return (2 * key.uniform(count * length) - 1) * math.sqrt(3 / length)
