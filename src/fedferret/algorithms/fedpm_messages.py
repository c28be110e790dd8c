"""What FedPM's nodes remember and send, and how a mask is drawn and packed; the algorithm is in ``fedpm.py``."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message, state


@state
class FedPMPublic(FedAvgPublic):
    """``weights``: the probabilities θ of all matrices, fp32; and what draws the frozen weights and models."""

    key: int


@state
class FedPMServer:
    """How often each weight was kept since the last reset, by how many masks, in how many rounds."""

    ones: dict[str, Tensor]
    masks: int
    rounds: int


@message
class DecodedMask:
    """Bits as 0.0 or 1.0, flat, padded to whole bytes: the form that adds up."""

    ones: dict[str, Tensor]


@message
class Mask(Payload[DecodedMask]):
    """A client's mask, eight weights to a byte."""

    bits: dict[str, Annotated[Tensor, Form(torch.uint8, rank=1)]]

    def decoded(self) -> DecodedMask:
        """The values behind the bits."""
        return DecodedMask({name: torch.from_numpy(np.unpackbits(b.numpy())).float() for name, b in self.bits.items()})

    def encoded(self, sum: DecodedMask, key: Key) -> Mask:
        """A mask with another sum for its expectation, as far as it lies between 0 and 1."""
        return Mask({name: packed(drawn(kept, key.fold(name))) for name, kept in sum.ones.items()})


@message
class FedPMEntry:
    """The new probabilities."""

    probabilities: dict[str, Annotated[Tensor, Form(torch.float32)]]


def drawn(probabilities: Tensor, key: Key) -> Tensor:
    """One Bernoulli draw of every probability.

    Args:
        probabilities: of any shape, on any device.
        key: of this tensor's draw.

    Returns:
        1.0 or 0.0 each, fp32, on the CPU.
    """
    uniform = key.uniform(probabilities.numel()).view(probabilities.shape)
    return (uniform < probabilities.cpu()).float()


def packed(draws: Tensor) -> Tensor:
    """Bits of a draw.

    Args:
        draws: 1.0 or 0.0 each, on the CPU.

    Returns:
        Eight to a byte, uint8, flat, padded with 0.
    """
    return torch.from_numpy(np.packbits(draws.flatten().numpy() > 0))
