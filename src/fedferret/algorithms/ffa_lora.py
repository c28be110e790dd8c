"""FFA-LoRA: FedIT with the matrices A frozen, so that the mean of the factors is the mean of the models.

Sun, Li, Li, Ding. "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.

    model:     y = W x + (α / r) B A x, W and A frozen, A the same on every node, B = 0 at first
    client j:  T local steps on all B
    server:    the mean of the B, weighted by examples: Σ p_j B_j A = (Σ p_j B_j) A

Wire: 4 d bytes up per client and round, 4 d down, with d = Σ r outputs over the tuned modules, about half of FedIT's.

It is FedIT with ``freeze_a``, to the bit; the name and the refusals are what is added. Deviations: FedIT's. The paper
adds noise for privacy in the local steps; here there is none. Its A is drawn as peft draws A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedferret.algorithms.fedit import FedIT
from fedferret.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FFALoRA(FedIT):
    """The weighted mean of the factors B on one A."""

    name: ClassVar[str] = "ffa-lora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    freeze_a: bool = True  # what the method is

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.freeze_a:
            raise UserError("freeze_a=false: ffa-lora is FedIT with A frozen; leave freeze_a out, or choose fedit")
        if self.dora:
            raise UserError("dora=true: with magnitudes the mean of the factors is no mean of the models; choose fedit")
