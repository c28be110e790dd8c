"""What SCAFFOLD's nodes remember and send; the algorithm is in ``scaffold.py``."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvgEntry, FedAvgPublic
from fedferret.algorithms.server_optimizer import Moments
from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.tree import Tree


@state
class ScaffoldPublic(FedAvgPublic):
    """All weights, and c, fp32."""

    control: Tree


@state
class ScaffoldServer:
    """Who has replied in any round, by name in order, and the memory of the server's optimiser."""

    clients: tuple[str, ...]
    moments: Moments | None


@state
class ScaffoldClient:
    """One client's c_j, fp32."""

    control: Tree


@message
class DecodedSteps:
    """An update, and the same per local step: the form that adds up."""

    delta: dict[str, Tensor]
    per_step: dict[str, Tensor]


@message
class ScaffoldUpdate(Payload[DecodedSteps]):
    """A client's update, w - w_j, fp32, and K_j, how many local steps it took."""

    delta: dict[str, Tensor]
    steps: int

    def decoded(self) -> DecodedSteps:
        """Both parts of the sum."""
        return DecodedSteps(self.delta, {name: delta / self.steps for name, delta in self.delta.items()})

    def encoded(self, sum: DecodedSteps, key: Key) -> ScaffoldUpdate:
        """Another update in as many steps."""
        return ScaffoldUpdate(sum.delta, self.steps)


@message
class ScaffoldEntry(FedAvgEntry):
    """The mean update, the step to take along it, and the new c."""

    control: dict[str, Annotated[Tensor, Form(torch.float32)]]
