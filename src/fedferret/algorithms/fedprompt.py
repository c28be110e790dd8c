"""FedPrompt: FedAvg of a learned prompt. The model is frozen; vectors that it reads before every example are tuned.

Zhao, Du, Li, Li, Liu. "FedPrompt: Communication-Efficient and Privacy-Preserving Prompt Tuning in Federated Learning",
ICASSP 2023, arXiv 2208.12268. Prompt tuning: Lester, Al-Rfou, Constant, EMNLP 2021, arXiv 2104.08691.

    model:     reads V vectors, then the example's embeddings; the V vectors are drawn at random at first
    client j:  T local steps on the V vectors
    server:    their mean, weighted by examples

Wire: 4 V h bytes up per client and round, 4 V h down, with h the model's width.

A classifier's head is trained and sent beside them.

Deviations: the paper tunes encoders and T5 on classification, with a verbaliser; here a class is read off pooled
features by a linear head, and a causal model's vectors are tuned on the loss of the response, as in the baselines of
FedKSeed and Ferret.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters


def _training() -> FirstOrder:
    """No learning rate is published for this baseline; this one did best of some on the tiny model: tune it."""
    return FirstOrder(optimizer="adamw", learning_rate=3e-2, clip=None)


@dataclass(frozen=True, kw_only=True)
class FedPrompt(FedAvg):
    """The weighted mean of a learned prompt's vectors."""

    name: ClassVar[str] = "fedprompt"
    virtual_tokens: int = 20  # V, the baseline's
    training: FirstOrder = field(default_factory=_training)

    def __post_init__(self) -> None:
        if self.virtual_tokens < 1:
            raise UserError(f"virtual_tokens={self.virtual_tokens}: must be at least 1")

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model behind a prompt."""
        return adapters.LearnedPrompt(tokens=self.virtual_tokens).attach(model, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The frozen model: a prompt has no place in the plain architecture."""
        return adapters.released(model)
