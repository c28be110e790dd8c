"""Values as signs and one magnitude: a bit each.

The magnitude m that minimises Σ (v_i - m sign v_i)² is the mean of |v_i|; what is lost is their variance. This is the
code of Sattler et al., arXiv 1903.02891 ("sparse ternary compression"), and of Karimireddy et al., "Error Feedback
Fixes SignSGD", ICML 2019, arXiv 1901.09847. It is biased, so it wants error feedback. Cost: ceil(n / 8) bytes.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fedferret.bases.quantise import finite_fp32, is_code, is_scale, join_bytes, num_bytes, rounded_to_fp32, split_bytes
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
    return Signs(join_bytes(values > 0, 1), rounded_to_fp32(scale), len(values))
