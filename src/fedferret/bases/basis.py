"""A basis: a random d x K matrix V that is never built, only multiplied by.

``project`` computes the coordinates c = s Vᵀ Δ of an update Δ. ``expand_`` adds V c to the weights. The two are adjoint
up to the scale s, which makes the average of V c over keys equal Δ (Ferret, arXiv 2409.06277, section 4.1). A block of
several tensors is never concatenated: each tensor is passed alone, with its ``offset`` in the block, and the
projections of the tensors add up in ``out``.

``expand_`` uses elementwise fp32 operations in a fixed order only, so it gives the same bits on every device and for
every chunk size, split of the block and thread count. Coordinates are sums: a split may change their last bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fedferret.core.errors import UserError
from fedferret.core.keys import Key


class Basis(ABC):
    """A family of random matrices. Subclasses are frozen dataclasses; their fields change speed, never values."""

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
        """Compute the coordinates c = s Vᵀ Δ of an update (Ferret, section 4.1).

        Args:
            delta: a piece of a block, any float dtype, shape and layout, read in row-major order.
            num_coordinates: K.
            key: of the block; the same for every piece of the block.
            size: number of elements of the block; default: of ``delta``.
            offset: position in the block of the first element of ``delta``.
            out: fp32, shape (K,); where given, the coordinates are added to it in place.

        Returns:
            The coordinates, fp32, shape (K,), summed in fp32: ``out`` where it is given.

        Raises:
            UserError: unless 1 <= K <= size <= max_size.
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
        """Add V (scale c) to a tensor in place. V c is formed in fp32; the sum is rounded once to the target's dtype.

        Args:
            target: a piece of a block, any float dtype, shape and layout, in row-major order.
            coordinates_K: c, any float dtype, shape (K,).
            key: of the block; the same for every piece of the block.
            scale: factor on the coordinates, rounded to fp32.
            size: number of elements of the block; default: of ``target``.
            offset: position in the block of the first element of ``target``.

        Returns:
            ``target`` itself, changed in place.

        Raises:
            UserError: unless 1 <= K <= size <= max_size.
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
        """The s that ``project`` applies.

        Args:
            size: d, number of weights of the block.
            num_coordinates: K.

        Returns:
            1 over the expected squared norm of a row of V.
        """

    @abstractmethod
    def error_energy(self, size: int, num_coordinates: int) -> float:
        """The squared error of an unbiased reconstruction V s Vᵀ Δ.

        Args:
            size: d, number of weights of the block.
            num_coordinates: K.

        Returns:
            |V s Vᵀ Δ - Δ|² in units of |Δ|², in expectation over keys.
        """

    def shrinkage(self, size: int, num_coordinates: int) -> float:
        """The factor on an unbiased reconstruction Δ̃ that minimises the expected squared error.

        Args:
            size: d, number of weights of the block.
            num_coordinates: K.

        Returns:
            <Δ̃, Δ> / |Δ̃|² in expectation, which is 1 / (1 + ``error_energy``).
        """
        return 1 / (1 + self.error_energy(size, num_coordinates))

    def expanded_energy(self, size: int, coordinates_K: Tensor) -> float:
        """The energy of V c: a column of V has a squared norm of d / (s K) on average.

        Args:
            size: d, number of weights of the block.
            coordinates_K: c, float64, shape (K,).

        Returns:
            |V c|² in expectation over keys.
        """
        count = coordinates_K.numel()
        return size / (self.unbiased_scale(size, count) * count) * float(coordinates_K.square().sum())

    @abstractmethod
    def _project(self, delta_N: Tensor, out_K: Tensor, key: Key, size: int, offset: int) -> None:
        """Add the coordinates of ``delta_N`` to ``out_K``."""

    @abstractmethod
    def _expand_(self, target_N: Tensor, coordinates_K: Tensor, key: Key, size: int, offset: int) -> None:
        """Add V times fp32 ``coordinates_K`` to ``target_N``."""

    def _checked_size(self, piece: Tensor, size: int | None, num_coordinates: int) -> int:
        size = piece.numel() if size is None else size
        if not 1 <= num_coordinates <= size:
            raise UserError(
                f"a block of {size:,} weights cannot have {num_coordinates:,} coordinates: give it 1 to {size:,}"
            )
        if size > self.max_size:
            raise UserError(
                f"a block of {size:,} weights is too large for {self.name}, which takes at most {self.max_size:,}: "
                f"choose another basis"
            )
        return size
