"""A whole model's change as K coordinates, block by block, one tensor at a time.

    blocks    consecutive tensors, packed (blocks.py)         counts    K_l per block, Σ K_l = K, from the norms ‖Δ_l‖
    measure   c = concatenation of s V_lᵀ Δ_l                  rebuild   Δ̃_l = f_l V_l c_l, f_l = 1 or the shrinkage

Block l's basis is drawn from ``key.fold(l)``: independent between blocks (the published code resets one seed
for all of them). Nothing of size d is concatenated and nothing of size d K exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedferret.bases.basis import Basis
from fedferret.bases.blocks import Block, allocate, pack
from fedferret.core.keys import Key

Allocation: TypeAlias = Literal["norm", "norm-sqrt-dim", "norm-squared", "uniform"]
Scale: TypeAlias = Literal["unbiased", "shrunk", "published-code"]
Budget: TypeAlias = Literal["total", "largest-block"]

# exact fractions take milliseconds, and the cohort, the server and every apply ask the same question
_allocated = lru_cache(maxsize=256)(allocate)


@lru_cache(maxsize=16)
def _packed(sizes: tuple[tuple[str, int], ...]) -> tuple[Block, ...]:
    return pack(dict(sizes))


@lru_cache(maxsize=64)
def _block_keys(key: Key, count: int) -> tuple[Key, ...]:
    """With shared keys, one answer for the whole cohort."""
    return tuple(key.fold(number) for number in range(count))


@dataclass(frozen=True)
class Projector:
    """How changes of a model of the given tensor ``sizes`` become ``coordinates`` numbers, and become changes again."""

    sizes: Mapping[str, int]  # elements per tensor, in the model's order
    basis: Basis
    coordinates: int
    allocation: Allocation
    budget: Budget = "total"
    scale: Scale = "unbiased"

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Consecutive tensors, packed by the paper's rule."""
        return _packed(tuple(self.sizes.items()))

    def counts(self, norms_L: Sequence[float]) -> tuple[int, ...]:
        """Coordinates per block for updates with these norms."""
        block_sizes = [block.size for block in self.blocks]
        if self.budget == "total":
            return _allocated(self.allocation, tuple(block_sizes), tuple(norms_L), self.coordinates)
        # the published code: K is the share of the block with the largest norm, and no block has fewer than two
        largest = max(norms_L) or 1.0
        return tuple(
            min(size, max(2, math.floor(self.coordinates * norm / largest)))
            for size, norm in zip(block_sizes, norms_L, strict=True)
        )

    def project(
        self, change: Iterable[tuple[str, Tensor]], counts: Sequence[int], key: Key
    ) -> tuple[Tensor, list[float]]:
        """Coordinates (K,) fp32 and block norms (L,) of a change streamed as (name, tensor) in the model's order."""
        coordinates: list[Tensor] = []
        tensor_norms: list[Tensor] = []
        tensors = iter(change)
        keys = _block_keys(key, len(self.blocks))
        for block, count, block_key in zip(self.blocks, counts, keys, strict=True):
            offset = 0
            out: Tensor | None = None
            for _ in block.names:
                _, delta = next(tensors)
                out = self.basis.project(delta, count, block_key, size=block.size, offset=offset, out=out)
                tensor_norms.append(torch.linalg.vector_norm(delta))
                offset += delta.numel()
            assert out is not None
            coordinates.append(out)
        return torch.cat(coordinates), self._block_norms(tensor_norms)

    def norms(self, change: Iterable[tuple[str, Tensor]]) -> list[float]:
        """Block norms (L,) alone."""
        return self._block_norms([torch.linalg.vector_norm(delta) for _, delta in change])

    def _block_norms(self, tensor_norms: Sequence[Tensor]) -> list[float]:
        """From those of all tensors in the model's order, fetched at once: one wait for a GPU, not one a tensor."""
        energies = iter([norm**2 for norm in torch.stack(list(tensor_norms)).tolist()])
        return [math.sqrt(sum(next(energies) for _ in block.names)) for block in self.blocks]

    def reconstruct_(
        self,
        targets: Mapping[str, Tensor],
        coordinates_K: Tensor,
        counts: Sequence[int],
        key: Key,
        factor: float = 1.0,
    ) -> None:
        """Add ``factor`` times the reconstructed change to ``targets``, in place."""
        # to the weights' device at once: one wait for a GPU, not one a tensor
        parts = torch.split(coordinates_K.to(next(iter(targets.values())).device), list(counts))
        keys = _block_keys(key, len(self.blocks))
        for block, part_K, block_key in zip(self.blocks, parts, keys, strict=True):
            offset = 0
            scale = factor * self._scale(block.size, part_K.numel())
            for name in block.names:
                target = targets[name]
                self.basis.expand_(target, part_K, block_key, scale, size=block.size, offset=offset)
                offset += target.numel()

    def _scale(self, size: int, count: int) -> float:
        if self.scale == "shrunk":
            return self.basis.shrinkage(size, count)
        if self.scale == "published-code":  # d/K where the unbiased scale is 1/(ρK)
            return size / count / self.basis.unbiased_scale(size, count)
        return 1.0

    def clip_bounds(self, bound: float, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Lowest and highest coordinates (K,) for which one coordinate moves the weights by at most ``bound``."""
        highest = [
            # a column of V has norm √(d / (s K)) on average
            bound / (math.sqrt(block.size / self.basis.unbiased_scale(block.size, count) / count))
            for block, count in zip(self.blocks, counts, strict=True)
        ]
        bounds = torch.repeat_interleave(torch.tensor(highest), torch.tensor(list(counts)))
        return -bounds, bounds
