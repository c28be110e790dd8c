"""FedAvg of the prefixes of some layers: each of the others has prefixes of each client's own, or none.

    public     all prefixes, and which layers are shared
    client j   with ``personal`` its own prefixes of the other layers

    client j:  T local steps; Δ_j of the shared layers' prefixes and of a classifier's head
    server:    Σ n_j Δ_j / Σ n_j

Base of ``ChosenPrefixes``, which chooses the layers; here all are shared. Wire: 4 bytes a shared weight, both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedpeptao_messages import FedPepTAOPublic
from fedferret.algorithms.fedptuning_v2 import FedPTuningV2, prefix_training
from fedferret.algorithms.partly_private import PartlyPrivate, PrivateWeights
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder, Trained
from fedferret.models import adapters
from fedferret.models.adapters.attention import prefix_groups


@dataclass(frozen=True, kw_only=True)
class PartialPrefixes(PartlyPrivate, FedPTuningV2):
    """FedAvg of some layers' prefixes. See ``Algorithm`` for arguments and results."""

    personal: bool = True  # the code's: in other layers each client has its own prefixes; False: none
    training: FirstOrder = field(default_factory=prefix_training)  # FedPTuning-v2's

    def init(self, task: Task, key: Key) -> tuple[FedPepTAOPublic, Any]:
        """All layers are shared."""
        weights = task.store(tree.parameters(task.model))
        return FedPepTAOPublic(weights, 0, torch.ones(len(prefix_groups(weights)), dtype=torch.uint8)), None

    def shared(self, task: Task, public: FedPepTAOPublic) -> list[str]:  # type: ignore[override]
        """The prefixes of the chosen layers, and what is no prefix: a classifier's head."""
        groups = prefix_groups(public.weights).values()
        others = {name for group, on in zip(groups, public.chosen.tolist(), strict=True) if not on for name in group}
        return [name for name in public.weights if name not in others]

    def private_of(  # type: ignore[override]
        self, task: Task, public: FedPepTAOPublic, client: PrivateWeights | None
    ) -> dict[str, Tensor]:
        """The prefixes of the other layers; none where these layers have no prefix."""
        return super().private_of(task, public, client) if self.personal else {}

    def train(self, task: Task, public: FedPepTAOPublic, data: Examples, key: Key) -> Trained:  # type: ignore[override]
        """FedAvg's, with the prefixes that the model has in this round."""
        with self._prefixes(task, public):
            return super().train(task, public, data, key)

    @contextmanager
    def model(  # type: ignore[override]
        self, task: Task, public: FedPepTAOPublic, client: PrivateWeights | None = None
    ) -> Iterator[nn.Module | None]:
        """The client's model; the global one has the public values in layers that are each client's own."""
        with self._prefixes(task, public), super().model(task, public, client) as model:
            yield model

    def _prefixes(self, task: Task, public: FedPepTAOPublic) -> AbstractContextManager[None]:
        """Layers that are not shared read no prefix, unless the prefixes are each client's own."""
        if self.personal:
            return nullcontext()
        left_out = (public.chosen == 0).nonzero().flatten().tolist()
        return adapters.without_prefixes(task.model, left_out)
