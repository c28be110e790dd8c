"""A classifier of the toy rows: 30 weights make six features, 21 make three logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedferret.models.classifiers import Classifier
from fedferret.objectives.classification import Classification

CLASSES = ("low", "middle", "high")
THREE_CLASSES = Classification(classes=CLASSES)


class ToyClassifier(Classifier):
    """Six features of four inputs; the label of a row is the range in which its target lies."""

    def __init__(self, inputs: int, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.Tanh())
        self.head = nn.Linear(width, len(CLASSES))

    def features(self, batch: Any) -> Tensor:
        """What the body makes of the inputs."""
        return self.features_of(batch.x)

    def input_shape(self, tokens: int) -> tuple[int, ...]:
        """The inputs as they are."""
        return (self.body[0].in_features,)  # type: ignore[return-value]

    def features_of(self, inputs: Tensor) -> Tensor:
        """What the body makes of them."""
        features_NH: Tensor = self.body(inputs)
        return features_NH
