"""FedPFT's messages and states: mixtures of features by class, and the head that is trained on draws from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.messages import message, state
from fedferret.core.pooling import within
from fedferret.core.tree import Tree
from fedferret.local.gaussian_mixtures import Kind, Mixture, are_positive, num_values, rounded

LARGEST = 1e6  # of a feature's magnitude: a head that is trained on features of this size stays finite in fp32
SLACK = 1.01  # rounding, and the floor of variances
PER_CLASS = 9  # bytes of label, count and number of components


@message
class Mixtures(Payload["Mixtures"]):
    """One mixture per class that is present: P classes, and M components in all."""

    labels: Annotated[Tensor, Form(torch.int32, rank=1)]  # (P,), ascending
    counts: Annotated[Tensor, Form(torch.int32, rank=1)]  # (P,), examples behind each mixture
    components: Annotated[Tensor, Form(torch.uint8, rank=1)]  # (P,), K of each
    weights: Annotated[Tensor, Form(torch.float32, rank=1)]  # (M,)
    means: Annotated[Tensor, Form(torch.float32, rank=2)]  # (M, H)
    covariances: Annotated[Tensor, Form(torch.float32, rank=2)]  # (M, S)

    @classmethod
    def of(cls, found: Mapping[int, tuple[int, Mixture]], kind: Kind, floor: float) -> Mixtures:
        """Write down mixtures.

        Args:
            found: count and mixture by label, ascending.
            kind: of the covariances.
            floor: as in ``rounded``.

        Returns:
            The message.
        """
        counts = [count for count, _ in found.values()]
        mixtures = [rounded(mixture, kind, floor) for _, mixture in found.values()]
        return cls(
            torch.tensor(list(found), dtype=torch.int32),
            torch.tensor(counts, dtype=torch.int32),
            torch.tensor([len(mixture.weights_K) for mixture in mixtures], dtype=torch.uint8),
            torch.cat([mixture.weights_K for mixture in mixtures]),
            torch.cat([mixture.means_KH for mixture in mixtures]),
            torch.cat([mixture.covariances_KS for mixture in mixtures]),
        )

    def by_label(self) -> dict[int, tuple[int, Mixture]]:
        """Read the mixtures.

        Returns:
            Count and mixture by label, ascending; fp32.
        """
        sizes: list[int] = self.components.tolist()
        parts = zip(*(torch.split(each, sizes) for each in (self.weights, self.means, self.covariances)), strict=True)
        rows = zip(self.labels.tolist(), self.counts.tolist(), parts, strict=True)
        return {label: (count, Mixture(*part)) for label, count, part in rows}


@message
class FedPFTEntry:
    """The head by the model's names; in a chain the mixtures so far too."""

    head: dict[str, Annotated[Tensor, Form(torch.float32)]]
    mixtures: Mixtures | None


@state
class FedPFTPublic:
    """The head, and in a chain the mixtures so far."""

    weights: Tree
    mixtures: Mixtures | None


@state
class FedPFTClient:
    """In a chain: since when a client's features are in the mixtures."""

    round: int


def bytes_of(classes: int, components: int, width: int, kind: Kind) -> int:
    """The bytes of mixtures.

    Args:
        classes: P.
        components: of each class.
        width: H.
        kind: of the covariances.

    Returns:
        P (9 + 4 K (1 + H + S)).
    """
    return classes * (PER_CLASS + 4 * components * (1 + width + num_values(kind, width)))


def check_mixtures(
    found: Mixtures, classes: int, width: int, kind: Kind, components: int, fewest: int, reach: float | None
) -> None:
    """Check everything that mixtures claim.

    Args:
        found: as they came from a client.
        classes: C.
        width: H.
        kind: of the covariances.
        components: K, the most of a class.
        fewest: the fewest examples behind a mixture.
        reach: the largest norm of a feature; None: not known.

    Raises:
        ValueError: with one line.
    """
    _check_forms(found, width, kind)
    labels, counts = found.labels.tolist(), found.counts.tolist()
    if labels != sorted(set(labels)) or labels[0] < 0 or labels[-1] >= classes:
        raise ValueError(f"the classes of the mixtures are not ascending numbers below {classes}")
    if min(counts) < fewest:
        raise ValueError(f"a mixture of {min(counts)} examples came: at least {fewest} are needed")
    if not 1 <= int(found.components.min()) <= int(found.components.max()) <= components:
        raise ValueError(f"a mixture has at least 1 component and at most {components}")
    for _, mixture in found.by_label().values():
        if bool((mixture.weights_K < 0).any()) or abs(float(mixture.weights_K.double().sum()) - 1) > 1e-4:
            raise ValueError("the weights of a mixture are not positive with the sum 1")
    if not are_positive(found.covariances, kind, width):
        raise ValueError("a covariance is not positive")
    largest = LARGEST if reach is None else min(LARGEST, SLACK * reach)
    if float(found.means.double().norm(dim=1).max()) > largest * (1 if reach else width**0.5):
        raise ValueError("a mean lies farther out than any feature can")
    if float(found.covariances.abs().max()) > largest**2 * SLACK:
        raise ValueError("a covariance is larger than that of any features")


def _check_forms(found: Mixtures, width: int, kind: Kind) -> None:
    """Types, shapes that fit each other, and finite values."""
    if not isinstance(found, Mixtures):
        raise ValueError(f"a {type(found).__name__} came where Mixtures were expected")
    whole: Sequence[tuple[Tensor, torch.dtype]] = (
        (found.labels, torch.int32),
        (found.counts, torch.int32),
        (found.components, torch.uint8),
    )
    floats = (found.weights, found.means, found.covariances)
    for value, dtype in (*whole, *((each, torch.float32) for each in floats)):
        if not isinstance(value, Tensor) or value.dtype != dtype:
            raise ValueError("the mixtures hold tensors of other types than this version sends")
    for value, _ in whole:
        if value.shape != (len(found.labels),) or not value.numel():
            raise ValueError("the mixtures state no label, count and number of components for each class")
    total = int(found.components.sum())
    shapes = ((total,), (total, width), (total, num_values(kind, width)))
    if tuple(tuple(each.shape) for each in floats) != shapes:
        raise ValueError("the mixtures' weights, means and covariances have other shapes than the classes ask for")
    if not all(within(each, float("inf")) for each in floats):
        raise ValueError("the mixtures hold NaN or infinity")
