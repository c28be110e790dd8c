"""Values as signs and one magnitude: a bit each.

The magnitude m that minimises Σ (v_i - m sign v_i)² is the mean of |v_i|; what is lost is their variance. This is the
code of Sattler et al., arXiv 1903.02891 ("sparse ternary compression"), and of Karimireddy et al., "Error Feedback
Fixes SignSGD", ICML 2019, arXiv 1901.09847. It is biased, so it wants error feedback. Cost: ceil(n / 8) bytes.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fedferret.bases.quantise import finite_fp32, is_code, is_scale, join_bytes, num_bytes, rounded, split_bytes
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.messages import message


@message
class Signs:
    """``length`` values of one magnitude, as they cross the wire."""

    codes: Annotated[Tensor, Form(torch.uint8, rank=1)]
    """uint8, shape (ceil(length / 8),): 1 for a value above 0, low bits of a byte first."""
    scale: float
    """The magnitude, an fp32 value."""
    length: int
    """Number of values."""

    def unpack(self) -> Tensor:
        """The values.

        Returns:
            fp32, shape (length,), each plus or minus the scale.

        Raises:
            UserError: where the fields contradict each other.
        """
        length = self.length if type(self.length) is int else -1
        if not (is_code(self.codes, length, num_bytes(length, 1)) and is_scale(self.scale)):
            raise UserError(
                f"{self.codes.numel():,} bytes are not {self.length:,} signs and a scale: the sender's version or the "
                f"transport is at fault"
            )
        signs = split_bytes(self.codes, 1, length).float().mul_(2).sub_(1)
        return signs * torch.tensor(self.scale, dtype=torch.float32)


def pack_signs(values_K: Tensor) -> Signs:
    """Pack values as signs and the mean of their magnitudes.

    Args:
        values_K: any float dtype, shape (K,).

    Returns:
        The message; a zero counts as negative.

    Raises:
        UserError: for values that are NaN, infinite or too large for fp32.
    """
    values = finite_fp32(values_K)
    scale = float(values.double().abs().mean()) if len(values) else 0.0
    return Signs(join_bytes(values > 0, 1), rounded(scale), len(values))


def fit_two_magnitudes(values_K: Tensor) -> tuple[Tensor, Tensor]:
    """Values in 2 bits: a sign, and one of two magnitudes, with the least squared error of all such codes.

    Args:
        values_K: finite, any float dtype, shape (K,).

    Returns:
        Codes from 0 to 3, uint8, shape (K,): 1 is added for a value above 0, 2 for the larger magnitude; the smaller
        and the larger magnitude, fp32, shape (2,), 0 where K is 0.
    """
    exact = values_K.double().cpu()
    ascending = exact.abs().sort().values
    if not len(ascending):
        return torch.zeros(0, dtype=torch.uint8), torch.zeros(2)
    # the squared error is Σ v² less, of each part, (its sum)² / its number: the parts are cut where that is the most
    sums, counts = ascending.cumsum(0), torch.arange(1, len(ascending) + 1).double()
    above, left = sums[-1] - sums, counts[-1] - counts
    cut = int((sums.square() / counts + above.square() / left.clamp_min(1)).argmax())
    small = sums[cut] / counts[cut]
    large = above[cut] / left[cut] if left[cut] else small
    codes = (exact > 0).byte() + 2 * (exact.abs() > ascending[cut]).byte()
    return codes, torch.stack((small, large)).float()


def two_magnitudes(codes_K: Tensor, magnitudes_K2: Tensor) -> Tensor:
    """The values behind the codes of ``fit_two_magnitudes``.

    Args:
        codes_K: from 0 to 3, int64, shape (K,).
        magnitudes_K2: of each value the smaller and the larger magnitude, fp32, shape (K, 2).

    Returns:
        fp32, shape (K,).
    """
    magnitudes = torch.where(codes_K >= 2, magnitudes_K2[:, 1], magnitudes_K2[:, 0])
    return torch.where(codes_K % 2 == 1, magnitudes, -magnitudes)
