"""A basis: a random d x K matrix V that is never built, only multiplied by.

``project`` measures an update Δ as c = s Vᵀ Δ and ``expand_`` adds V c to the weights: an adjoint pair up to the scale
s, which makes the average of V c over keys equal Δ (Ferret, arXiv 2409.06277, section 4.1). A block of several tensors
is never concatenated: each tensor is passed alone, with its ``offset`` in the block, and projections add up in ``out``.

Reconstruction uses elementwise fp32 operations in a fixed order only: ``expand_`` gives the same bits on every device
and for every chunk size, split of the block and thread count. Coordinates are sums: a split may change their last bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fedferret.core.errors import UserError, nearest
from fedferret.core.keys import Key


class Basis(ABC):
    """A family of random matrices; subclasses are frozen dataclasses whose fields change speed, never values."""

    name: ClassVar[str]
    max_size: ClassVar[int]

    def project(
        self,
        delta: Tensor,
        num_coordinates: int,
        key: Key,
        *,
        size: int | None = None,
        offset: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """The coordinates s Vᵀ Δ, fp32 (num_coordinates,), summed in fp32; added to ``out`` where it is given.

        ``delta`` is a piece of a block in any float dtype, shape and layout, read in row-major order; it starts at
        element ``offset`` of the block's ``size`` elements (default: the piece is the block). Every piece of a block
        takes the same ``key``. Raises ``UserError`` unless 1 <= num_coordinates <= size.
        """
        size = self._checked_size(delta, size, num_coordinates)
        with torch.no_grad():
            if out is None:
                out = torch.zeros(num_coordinates, dtype=torch.float32, device=delta.device)
            self._project(delta.reshape(-1), out, key, size, offset)
        return out

    def expand_(
        self,
        target: Tensor,
        coordinates_K: Tensor,
        key: Key,
        scale: float = 1.0,
        *,
        size: int | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Add V (scale c) to ``target`` in place and return it; ``target`` is a piece of a block as in ``project``.

        ``scale`` (rounded to fp32) multiplies the coordinates, V c is formed in fp32, and the sum is rounded once to
        the target's dtype.
        """
        size = self._checked_size(target, size, coordinates_K.numel())
        with torch.no_grad():
            scaled_K = coordinates_K.to(target.device, torch.float32) * torch.tensor(scale, dtype=torch.float32)
            if target.dim() == 1 or target.is_contiguous():
                self._expand_(target.view(-1) if target.dim() != 1 else target, scaled_K, key, size, offset)
            else:
                flat = target.reshape(-1)  # a copy: no view of this layout is in row-major order
                self._expand_(flat, scaled_K, key, size, offset)
                target.copy_(flat.view(target.shape))
        return target

    @abstractmethod
    def unbiased_scale(self, size: int, num_coordinates: int) -> float:
        """The s that ``project`` applies: 1 over the expected squared norm of a row of V."""

    @abstractmethod
    def error_energy(self, size: int, num_coordinates: int) -> float:
        """The expected squared reconstruction error |V s Vᵀ Δ - Δ|² in units of |Δ|²."""

    def shrinkage(self, size: int, num_coordinates: int) -> float:
        """The factor on an unbiased reconstruction that minimises its error, <Δ̃, Δ> / |Δ̃|² in expectation."""
        return 1 / (1 + self.error_energy(size, num_coordinates))

    @abstractmethod
    def _project(self, delta_N: Tensor, out_K: Tensor, key: Key, size: int, offset: int) -> None: ...

    @abstractmethod
    def _expand_(self, target_N: Tensor, coordinates_K: Tensor, key: Key, size: int, offset: int) -> None: ...

    def _checked_size(self, piece: Tensor, size: int | None, num_coordinates: int) -> int:
        size = piece.numel() if size is None else size
        if not 1 <= num_coordinates <= size:
            raise UserError(
                f"a block of {size:,} weights cannot have {num_coordinates:,} coordinates: give it 1 to {size:,}"
            )
        if size > self.max_size:
            raise UserError(f"a block of {size:,} weights is over the {self.max_size:,} that {self.name} can number")
        return size


def basis(name: str) -> Basis:
    """The basis called ``name``: "sign-buckets" or "truncated-normal"; ``UserError`` naming the nearest otherwise."""
    from fedferret.bases.sign_buckets import SignBuckets  # here, because both modules import this one
    from fedferret.bases.truncated_normal import TruncatedNormal

    bases: dict[str, type[Basis]] = {kind.name: kind for kind in (SignBuckets, TruncatedNormal)}
    if name not in bases:
        raise UserError(f'there is no basis "{name}": {nearest(name, bases)}')
    return bases[name]()


def add_rounded_(target_N: Tensor, increment_N: Tensor) -> None:
    """Add an fp32 increment to a tensor of any float dtype: the sum is formed in fp32 and rounded once."""
    if target_N.dtype == torch.float32:
        target_N += increment_N
    else:
        target_N.copy_(target_N.float().add_(increment_N))


def fold_rows_(values_RN: Tensor) -> Tensor:
    """The sum over rows as a fixed tree of elementwise additions: the same bits for every thread count. In place."""
    rows = values_RN.shape[0]
    while rows > 1:
        half = rows // 2
        values_RN[:half] += values_RN[rows - half : rows]
        rows -= half
    return values_RN[0]
