"""FedPTuning: FedAvg of a prompt encoder. The model is frozen; a network that makes a prompt of V vectors is tuned.

Kuang, Qian, Li, Chen, Gao, Pan, Xie, Li, Ding, Zhou. "FederatedScope-LLM", KDD 2024, arXiv 2309.00363, which tunes
prompts so. P-tuning: Liu et al. "GPT Understands, Too", arXiv 2103.10385.

    model:     reads the V vectors p = M(e), then the example's embeddings; e is V vectors, M three linear layers with
               ReLU between them
    client j:  T local steps on e and M
    server:    the mean of the e and of the M, weighted by examples

Wire: 4 d bytes up per client and round, 4 d down, with d = V h + (h w + w) + (w w + w) + (w h + h), h the model's width
and w the hidden layers'. The whole encoder travels, though the model reads V h numbers alone; those are exported.

Deviations: the LSTM of the p-tuning paper is left out, as the baseline of FedKSeed and Ferret does.
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
    return FirstOrder(optimizer="adamw", learning_rate=1e-3, clip=None)


@dataclass(frozen=True, kw_only=True)
class FedPTuning(FedAvg):
    """The weighted mean of prompt encoders."""

    name: ClassVar[str] = "fedptuning"
    virtual_tokens: int = 20  # V, the baseline's
    encoder_width: int | None = None  # w; None is the model's width, the baseline's
    training: FirstOrder = field(default_factory=_training)

    def __post_init__(self) -> None:
        for name in ("virtual_tokens", "encoder_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model behind a prompt and the prompt's encoder."""
        return adapters.EncodedPrompt(tokens=self.virtual_tokens, width=self.encoder_width).attach(model, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The frozen model: a prompt has no place in the plain architecture."""
        return adapters.released(model)
