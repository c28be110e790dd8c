"""The update of a whole model as K coordinates, block by block, one tensor at a time.

    blocks         consecutive tensors, packed (blocks.py)
    counts         K_l per block, Σ K_l = K, from the norms ‖Δ_l‖
    project        c = concatenation of s V_lᵀ Δ_l
    reconstruct_   Δ̃_l = f_l V_l c_l, f_l = 1 or the shrinkage

The basis of block l is drawn from ``key.fold(l)``, independently for every block (the published code resets one seed
for all blocks). Nothing of size d is concatenated and nothing of size d K exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fedferret.bases.basis import Basis
from fedferret.bases.blocks import Block, allocate, pack
from fedferret.bases.stochastic_rounding import rounded_once
from fedferret.core.keys import Key

Allocation: TypeAlias = Literal["norm", "norm-sqrt-dim", "norm-squared", "uniform"]
Scale: TypeAlias = Literal["unbiased", "shrunk"]

# exact fractions take milliseconds, and every client, the server and every apply need the same allocation
_allocated = lru_cache(maxsize=256)(allocate)


class Step(NamedTuple):
    """One reconstruction that is added to the weights."""

    coordinates: Tensor  # c, any float dtype, shape (K,)
    counts: Sequence[int]  # K_l per block, length L, summing to K
    key: Key  # of the directions
    factor: float  # on the update


@lru_cache(maxsize=16)
def _packed(sizes: tuple[tuple[str, int], ...]) -> tuple[Block, ...]:
    return pack(dict(sizes))


@lru_cache(maxsize=64)
def _block_keys(key: Key, count: int) -> tuple[Key, ...]:
    """Keys of the blocks; with shared keys all clients of a round use the cached ones."""
    return tuple(key.fold(number) for number in range(count))


@dataclass(frozen=True)
class Projector:
    """The map from updates of a model to coordinates, and from coordinates to updates."""

    sizes: Mapping[str, int]  # number of weights per tensor, in the model's order
    basis: Basis
    coordinates: int  # K
    allocation: Allocation
    scale: Scale = "unbiased"

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Consecutive tensors, packed by the paper's rule."""
        return _packed(tuple(self.sizes.items()))

    def counts(self, norms_L: Sequence[float]) -> tuple[int, ...]:
        """Share the coordinates among the blocks by ``allocation``.

        Args:
            norms_L: ‖Δ_l‖ per block, length L.

        Returns:
            K_l per block, length L, summing to K.
        """
        block_sizes = tuple(block.size for block in self.blocks)
        return _allocated(self.allocation, block_sizes, tuple(norms_L), self.coordinates)

    def project(
        self, deltas: Iterable[tuple[str, Tensor]], counts: Sequence[int], key: Key
    ) -> tuple[Tensor, list[float]]:
        """Project an update, block by block.

        Args:
            deltas: the update as (name, tensor), in the model's order, any float dtype; read once.
            counts: K_l per block, length L.
            key: of the directions; every block's key is derived from it.

        Returns:
            Coordinates, fp32, shape (K,), and ‖Δ_l‖ per block, length L.
        """
        coordinates: list[Tensor] = []
        tensor_norms: list[Tensor] = []
        tensors = iter(deltas)
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

    def norms(self, deltas: Iterable[tuple[str, Tensor]]) -> list[float]:
        """The block norms of an update, without a projection.

        Args:
            deltas: the update as (name, tensor), in the model's order, any float dtype; read once.

        Returns:
            ‖Δ_l‖ per block, length L.
        """
        return self._block_norms([torch.linalg.vector_norm(delta) for _, delta in deltas])

    def _block_norms(self, tensor_norms: Sequence[Tensor]) -> list[float]:
        """Block norms from tensor norms in the model's order, fetched together: one GPU wait, not one per tensor."""
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
        """Add ``factor`` times the reconstructed update Δ̃ to a model's tensors in place.

        Args:
            targets: the model's tensors by name, any float dtype.
            coordinates_K: c, any float dtype, shape (K,).
            counts: K_l per block, length L, summing to K.
            key: of the directions, as in ``project``.
            factor: on the update.
        """
        # moved to the weights' device together: one GPU wait, not one per tensor
        parts = torch.split(coordinates_K.to(next(iter(targets.values())).device), list(counts))
        keys = _block_keys(key, len(self.blocks))
        for block, part_K, block_key in zip(self.blocks, parts, keys, strict=True):
            offset = 0
            scale = factor * self._scale(block.size, part_K.numel())
            for name in block.names:
                target = targets[name]
                self.basis.expand_(target, part_K, block_key, scale, size=block.size, offset=offset)
                offset += target.numel()

    def add_steps_(self, targets: Mapping[str, Tensor], steps: Iterable[Step], rounding: Key) -> None:
        """Add reconstructed updates to a model's tensors in place; bf16 tensors are rounded once, after all of them.

        For fp32 tensors the bits are those of calls of ``reconstruct_`` in this order, and one step's coordinates are
        in memory at a time; for bf16 all steps' coordinates are, and one tensor in fp32.

        Args:
            targets: the model's tensors by name, fp32 or bf16.
            steps: in order; read once.
            rounding: of this change of the weights; every tensor's key is derived from it by the tensor's name.
        """
        if all(target.dtype == torch.float32 for target in targets.values()):
            for step in steps:
                self.reconstruct_(targets, *step)
            return
        device = next(iter(targets.values())).device
        kept = list(steps)
        parts = [torch.split(step.coordinates.to(device), list(step.counts)) for step in kept]
        keys = [_block_keys(step.key, len(self.blocks)) for step in kept]
        for number, block in enumerate(self.blocks):
            offset = 0
            for name in block.names:
                with rounded_once(targets[name], rounding.fold(name)) as target:
                    for step, parts_L, keys_L in zip(kept, parts, keys, strict=True):
                        scale = step.factor * self._scale(block.size, parts_L[number].numel())
                        where = {"size": block.size, "offset": offset}
                        self.basis.expand_(target, parts_L[number], keys_L[number], scale, **where)
                offset += targets[name].numel()

    def _scale(self, size: int, count: int) -> float:
        """f_l of a block of ``size`` weights with ``count`` coordinates."""
        if self.scale == "shrunk":
            return self.basis.shrinkage(size, count)
        return 1.0

    def reconstructed_norm(self, coordinates_K: Tensor, counts: Sequence[int]) -> float:
        """The norm of the reconstructed update, from its coordinates alone.

        Args:
            coordinates_K: c, fp32, shape (K,).
            counts: K_l per block, length L, summing to K.

        Returns:
            ‖Δ̃‖: exact for sign buckets, in expectation over keys for columns.
        """
        energies = []
        for block, part_K in zip(self.blocks, torch.split(coordinates_K.double(), list(counts)), strict=True):
            scale = self._scale(block.size, part_K.numel())
            energies.append(scale**2 * self.basis.expanded_energy(block.size, part_K))
        return math.sqrt(math.fsum(energies))
