"""How alike a layer makes the examples of a batch: FedPepTAO's score of a layer.

    S = cosines between the examples' hidden states, (B, B)      λ = eigenvalues of S + 1e-5
    ζ = Σ_j (log λ_j + 1 / λ_j)

B orthogonal examples have ζ = B (log(1 + 1e-5) + 1 / (1 + 1e-5)), the least. Nearly collinear ones have eigenvalues
near 0 and a ζ of up to about 1e5 (B − 1). With B = 1 every layer has the same ζ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedferret.local.layer_outputs import observing_outputs

SHIFT = 1e-5  # the published code's; keeps the logarithm and the reciprocal finite


def zeta(hidden_BF: Tensor) -> float:
    """The score of one layer.

    Args:
        hidden_BF: hidden states of B examples, flattened, any float dtype. The scale of an example has no effect.

    Returns:
        ζ, computed in fp64 on the CPU.
    """
    rows_BF = nn.functional.normalize(hidden_BF.detach().double().cpu(), dim=1)
    values_B = torch.linalg.eigvalsh(rows_BF @ rows_BF.T).clamp(min=0) + SHIFT  # rounding may go below 0
    return float((values_B.log() + 1 / values_B).sum())


@contextmanager
def scored(layers: Sequence[nn.Module], mask_BT: Tensor | None) -> Iterator[dict[int, float]]:
    """Score layers while a model computes.

    Args:
        layers: modules that return hidden states of shape (B, T, H), alone or as the first of several results.
        mask_BT: 0 where there is padding, which counts for nothing; None: no padding.

    Returns:
        A context that gives scores by the layers' places, filled in by a forward pass within it.
    """
    scores: dict[int, float] = {}

    def score(place: int, hidden_BTH: Tensor) -> None:
        if mask_BT is not None:
            hidden_BTH = hidden_BTH * mask_BT[:, :, None].to(hidden_BTH)
        scores[place] = zeta(hidden_BTH.flatten(1))

    with observing_outputs(layers, score):
        yield scores
