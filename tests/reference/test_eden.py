"""Parity of ``pack_vector`` below 8 bits with EDEN (Vargaftik et al., ICML 2022, arXiv 2108.08842)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedferret.bases.quantise import Packed, pack_vector
from fedferret.bases.rotation import rotate, rotate_back
from fedferret.core.keys import Key

KEY = Key.of(8, "eden")


def vector(kind: str, length: int) -> Tensor:
    """Gaussian values, or their fifth powers, or one value of nearly all the energy."""
    gaussian = torch.special.ndtri(KEY.fold(kind, length).uniform(length).clamp(1e-9, 1 - 1e-9))
    if kind == "one heavy":
        gaussian[length // 3] = 1000.0
    values: Tensor = gaussian**5 if kind == "fifth powers" else gaussian
    return values.float()


def lloyd_max(bits: int) -> Tensor:
    """The centroids of the best quantiser of a standard Gaussian: each is the mean of what is nearest to it."""
    centroids = (
        torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64) if bits > 1 else torch.tensor([-1.0, 1.0]).double()
    )
    infinity = torch.tensor([math.inf]).double()
    for _ in range(3000):
        bounds = torch.cat((-infinity, (centroids[1:] + centroids[:-1]) / 2, infinity))
        density = torch.exp(-bounds.square() / 2) / math.sqrt(2 * math.pi)
        centroids = -density.diff() / torch.special.ndtr(bounds).diff()
    return centroids


def eden(values: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """EDEN's message as its numbers: S times a centroid for every rotated value; and the rotated values."""
    rotated = rotate(values, Key(seed)).double()
    normal = rotated * math.sqrt(len(values)) / rotated.norm()  # close to a standard Gaussian
    centroids = lloyd_max(bits)
    nearest = centroids[(normal[:, None] - centroids).abs().argmin(dim=1)]
    scale = values.double().square().sum() / (rotated @ nearest)  # unbiased: ‖x‖² / <R x, c(R x)>
    return scale * nearest, rotated


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gaussian", "fifth powers", "one heavy"])
@pytest.mark.parametrize("length", [4096, 3000])
def test_few_bits_are_edens_centroids_and_scale(kind: str, length: int, bits: int) -> None:
    values = vector(kind, length)
    packed = pack_vector(values, bits, KEY)
    assert isinstance(packed, Packed)
    expected, _ = eden(values, bits, packed.seed)
    ours = rotate(packed.unpack(), Key(packed.seed)).double()
    # a rotated value within rounding of a boundary may have the other centroid: it hardly ever does
    apart = (ours - expected).abs() > 2e-4 * float(expected.abs().max())
    assert int(apart.sum()) == 0
    torch.testing.assert_close(packed.unpack(), rotate_back(expected.float(), Key(packed.seed)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "fifth powers", "one heavy"])
def test_at_one_bit_a_value_is_the_energy_over_the_sum_of_magnitudes(kind: str) -> None:
    """EDEN's S at one bit, which is DRIVE's: ‖y‖² / ‖y‖₁ with y = R x, and ‖x‖² / <R x, sign(R x)>."""
    values = vector(kind, 5000)
    packed = pack_vector(values, 1, KEY)
    _, rotated = eden(values, 1, packed.seed)
    magnitude = packed.scale * math.sqrt(2 / math.pi)
    assert magnitude == pytest.approx(float(rotated.square().sum() / rotated.abs().sum()), rel=1e-6)
    assert magnitude == pytest.approx(float(values.double().square().sum() / (rotated @ rotated.sign())), rel=1e-5)
