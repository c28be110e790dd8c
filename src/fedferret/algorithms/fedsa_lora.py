"""FedSA-LoRA: every client trains A and B; the A are averaged, and each client keeps its B.

Guo, Zeng, Wang, Fan, Wang, Qu. "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
arXiv 2410.01463, Algorithm 1: A is found to hold what clients have in common, B what is each client's own.

    model j:   y = W x + (α / r) B_j A x, W frozen, B_j = 0 at first
    client j:  T local steps on A and B_j, from the common A and its own B_j; sends A
    server:    the mean of the A, weighted by examples

Wire: 4 d bytes up per client and round, 4 d down, with d = Σ r inputs over the tuned modules, and what
``modules_to_save`` adds; a client keeps 4 Σ r outputs, and a classifier's head.

There is no global model: a client that never trained has the base. Deviations: FedIT's; updates are weighted by
examples (``weighting``), where the authors' code counts every client once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedferret.algorithms.fedit import FedIT, adam
from fedferret.algorithms.partly_private import PartlyPrivate
from fedferret.core.errors import UserError
from fedferret.local.first_order import FirstOrder
from fedferret.models.adapters import FACTOR_B
from fedferret.models.classifiers import HEAD


@dataclass(frozen=True, kw_only=True)
class FedSALoRA(PartlyPrivate, FedIT):
    """The weighted mean of the factors A; the factors B stay at their clients."""

    name: ClassVar[str] = "fedsa-lora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    has_global_model: ClassVar[bool] = False  # the public B stay zero: that is the base
    private_head: bool = True  # a classifier's head stays at its client, as in the authors' code
    training: FirstOrder = field(default_factory=adam)  # FedIT's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_a:
            raise UserError("freeze_a=true: fedsa-lora shares A alone, so nothing would be shared; choose ffa-lora")
        if self.dora:
            raise UserError(
                "dora=true: the method does not say who has the magnitudes; leave dora out, or choose fedit"
            )

    def shares(self, names: Iterable[str]) -> list[str]:
        """All but the factors B, and a classifier's head unless it is shared."""
        return [name for name in names if not (name.endswith(FACTOR_B) or self._is_private_head(name))]

    def _is_private_head(self, name: str) -> bool:
        return self.private_head and name.startswith(HEAD)
