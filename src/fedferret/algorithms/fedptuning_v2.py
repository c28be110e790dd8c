"""FedPTuning-v2: FedAvg of per-layer prefixes. The model is frozen; keys and values that it reads first are tuned.

What FedPepTAO begins from: Che, Liu, Zhou, Ren, Zhou, Sheng, Dai, Dou. "Federated Learning of Large Language Models
with Parameter-Efficient Prompt Tuning and Adaptive Optimization", EMNLP 2023, arXiv 2310.15080. P-tuning v2: Liu et
al., ACL 2022, arXiv 2110.07602.

    model:     each attention layer l reads p keys K_l and values V_l, then the example's own
    client j:  T local steps on all K_l and V_l
    server:    their mean, weighted by examples

Wire: 4 d bytes up per client and round, 4 d down, with d = p Σ_l (widths of l's keys and of its values, all heads);
2 p L h in a transformer of L layers of width h with as many heads of keys as of queries. A classifier's head is trained
and sent beside them.

Deviations: prefixes take no position, where the official codes count the tokens behind them from p on; no dropout on
them; the first values have deviation 0.02, not 1; a classifier has a linear head and no verbaliser.
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


def prefix_training() -> FirstOrder:
    """FedPepTAO's optimiser, with its clipping and without its decay; the learning rate is ours: tune it."""
    return FirstOrder(optimizer="adamw", learning_rate=1e-2, clip=1.0)


@dataclass(frozen=True, kw_only=True)
class FedPTuningV2(FedAvg):
    """The weighted mean of per-layer prefixes."""

    name: ClassVar[str] = "fedptuning-v2"
    virtual_tokens: int = 20  # p, FedPepTAO's for RoBERTa-large; it has 5 for GPT-2-large and LLaMA
    training: FirstOrder = field(default_factory=prefix_training)

    def __post_init__(self) -> None:
        if self.virtual_tokens < 1:
            raise UserError(f"virtual_tokens={self.virtual_tokens}: must be at least 1")

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with prefixes."""
        return adapters.Prefix(tokens=self.virtual_tokens).attach(model, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The frozen model: prefixes have no place in the plain architecture."""
        return adapters.released(model)
