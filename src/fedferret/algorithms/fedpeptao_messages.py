"""What FedPepTAO's nodes remember and send; the algorithm is in ``fedpeptao.py``."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fedferret.algorithms.fedavg import Delta, FedAvgPublic
from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.messages import message, state


@state
class FedPepTAOPublic(FedAvgPublic):
    """All tuned weights, finished rounds, and which of the L layers are shared: uint8, 1 or 0, shape (L,)."""

    round: int
    chosen: Annotated[Tensor, Form(torch.uint8, rank=1)]


@state
class FedPepTAOServer:
    """The server's own memory of directions, by the shared weights' names; empty before the first step."""

    controls: dict[str, dict[str, Tensor]]  # c_j, by client
    control: dict[str, Tensor]  # c
    momentum: dict[str, Tensor]  # v
    previous: dict[str, Tensor]  # the mean update of the round before
    steps: int  # steps that the server took


@message
class SteppedDelta(Delta):
    """A client's update, w - w_j, of the shared weights, and K_j, how many local steps it took."""

    steps: int


@message
class LayerScores(Payload["LayerScores"]):
    """A client's scores of the layers but the last, and where it is measured, the share of layers to keep."""

    scores: Annotated[Tensor, Form(torch.float32, rank=1)]  # (L - 1,)
    share: Annotated[Tensor, Form(torch.float32, rank=1)]  # (1,) or (0,)


@message
class SharedLayers:
    """Which of the L layers are shared from now on: uint8, 1 or 0, shape (L,)."""

    chosen: Annotated[Tensor, Form(torch.uint8, rank=1)]
