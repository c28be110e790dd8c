"""The methods that tune adapters, and the tiny model and batch that their tests use."""

from __future__ import annotations

from torch import nn

from fedferret import models
from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.fedprompt import FedPrompt
from fedferret.algorithms.fedptuning import FedPTuning
from fedferret.algorithms.fedptuning_v2 import FedPTuningV2
from fedferret.data.batches import Batch, TokenisedData
from fedferret.data.templates import Tokens
from toys import AnyAlgorithm

METHODS: dict[str, AnyAlgorithm] = {
    "fedit": FedIT(),
    "fedptuning": FedPTuning(),
    "fedptuning-v2": FedPTuningV2(),
    "fedprompt": FedPrompt(),
}


def base() -> nn.Module:
    model: nn.Module = models.load("tiny").model
    return model


def batch() -> Batch:
    """Two examples of 9 and 6 tokens with responses of 4 and 2."""
    examples = [Tokens(tuple(range(3, 12)), 5, False), Tokens(tuple(range(40, 46)), 4, False)]
    (rows,) = TokenisedData(examples).batches(2, None)
    return rows


# --- what is tuned
