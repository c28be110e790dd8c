"""A classifier for methods in which every client keeps its body: features of one width and size, and a head over them.

    x = clamp(normalise(P f + p))            f: what the body makes of an example, H values; x: m values
    logits_NC = head(x_NM)                   the head has a bias

``projection`` (P, p) is there where a width m is asked for, so that bodies of any H feed heads of one form. Both belong
to the body. The body's first values stay at hand: every client begins from them, whatever the working model holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.tree import Tree
from fedferret.models.classifier_loading import classifier
from fedferret.models.classifiers import HEAD, Classifier
from fedferret.models.drawing import draw_uniform
from fedferret.models.images import MODELS

Normalise: TypeAlias = Literal["none", "l2", "layer-norm"]
BASE = ""  # names the body of the recipe's own model


@dataclass(frozen=True)
class FeatureForm:
    """What becomes of a body's features before the head.

    Attributes:
        width: m, of the projection; None: there is none, and m is the body's H.
        normalise: "l2" divides by the Euclidean norm, "layer-norm" makes mean 0 and variance 1 of each example.
        clamp: b, the largest magnitude of a feature; None: unbounded.
    """

    width: int | None = None
    normalise: Normalise = "none"
    clamp: float | None = None

    def bound(self, width: int) -> float | None:
        """The largest Euclidean norm that features can have.

        Args:
            width: m.

        Returns:
            The least of 1 (l2), √m (layer-norm) and b √m (clamp); None where features are unbounded.
        """
        bounds = {"l2": [1.0], "layer-norm": [width**0.5], "none": []}[self.normalise]
        return min([*bounds, *([] if self.clamp is None else [self.clamp * width**0.5])], default=None)

    def applied(self, features_NM: Tensor) -> Tensor:
        """Normalise and clamp.

        Args:
            features_NM: after the projection, fp32.

        Returns:
            What the head reads, of the same shape.
        """
        if self.normalise == "l2":
            features_NM = functional.normalize(features_NM, dim=1)
        if self.normalise == "layer-norm":
            features_NM = functional.layer_norm(features_NM, features_NM.shape[1:])
        return features_NM if self.clamp is None else features_NM.clamp(-self.clamp, self.clamp)


class PrivateBodyClassifier(Classifier):
    """A classifier with a body of any architecture, under a head that reads features of one form.

    Attributes:
        inner: the classifier that makes the features; its own head is put aside.
        projection: P and p; None where the body's own width is the head's.
        body: the name of the architecture in ``inner``; ``BASE`` is the recipe's own.
    """

    inner: nn.Module | None
    projection: nn.Linear | None

    def __init__(self, inner: Classifier, form: FeatureForm, key: Key) -> None:
        """Put a projection, if one is asked for, and a new head over a classifier's features.

        Args:
            inner: with the adapter to train, if any; changed in place. On the meta device nothing is drawn.
            form: of the features.
            key: draws projections.
        """
        super().__init__()
        self.form, self._key, self.body = form, key, BASE
        own = inner.head
        self._plain = form == FeatureForm() and own.bias is not None
        self._put(inner)
        with torch.random.fork_rng(devices=[]), torch.device(own.weight.device):  # torch initialises layers
            self.head = nn.Linear(form.width or own.in_features, own.out_features)
        if form.width is None:  # then the head may begin as the model's own
            with torch.no_grad():
                self.head.weight.copy_(own.weight)
                self.head.bias.zero_()
        else:
            draw_uniform(self.head.weight, 1 / form.width, Key.of(0, "head"))
            nn.init.zeros_(self.head.bias)
        self._first = tree.clone(self.private())

    def features(self, batch: Any) -> Tensor:
        """What the head reads.

        Args:
            batch: as the classifier inside reads it.

        Returns:
            Features, fp32, shape (N, m), on the model's device.
        """
        inner: Any = self.inner
        features_NM: Tensor = inner.features(batch)
        if self.projection is not None:
            features_NM = self.projection(features_NM)
        return self.form.applied(features_NM)

    def private(self) -> dict[str, Tensor]:
        """The trainable weights of body and projection.

        Returns:
            All trainable weights but the head's, by name; detached, not copied.
        """
        return {name: weight for name, weight in tree.parameters(self).items() if not name.startswith(HEAD)}

    def start(self, body: str) -> None:
        """Hold an architecture with its first weights, the same in every process.

        Args:
            body: the name of an image model, or ``BASE``.
        """
        if body == BASE:
            tree.copy_(self.private(), self._first)
        else:
            self._rebuild(body)

    def hold(self, body: str, weights: Tree) -> None:
        """Hold a client's body.

        Args:
            body: the name of the client's architecture.
            weights: of body and projection.
        """
        if body != self.body:
            self._rebuild(body)
        tree.copy_(self.private(), weights)

    def plain(self) -> Classifier:
        """The classifier inside, with this one's head.

        Returns:
            The plain architecture.

        Raises:
            UserError: the plain architecture has no place for what the head reads here.
        """
        if not self._plain:
            raise UserError(
                "the plain model has no place for a projection, normalised or clamped features, or a head's bias; set "
                'features="none", normalise="none" and clamp="none", with a model that has a head with a bias'
            )
        inner: Any = self.inner
        inner.head = self.head
        return inner  # type: ignore[no-any-return]  # a classifier

    def _rebuild(self, body: str) -> None:
        """Replace the body by another architecture's, drawn by its name; the old one's memory is free."""
        device, classes = str(self.device), self.head.out_features
        self.inner, self.projection = None, None  # one architecture at a time in memory
        self._put(classifier(body, classes, device=device).model)
        self.body = body

    def _put(self, inner: Classifier) -> None:
        """Take a classifier's features; a projection of its width is drawn."""
        own, width = inner.head, self.form.width
        inner.head = nn.Identity()  # type: ignore[assignment]  # this classifier's head is the one that is used
        self.inner = inner
        self.projection = None
        if width is not None:
            with torch.random.fork_rng(devices=[]), torch.device(own.weight.device):
                self.projection = nn.Linear(own.in_features, width)
            draw_uniform(self.projection.weight, 1 / own.in_features, self._key.fold("projection", own.in_features))
            nn.init.zeros_(self.projection.bias)


def image_features(body: str) -> int:
    """How many features an image model makes.

    Args:
        body: its name.

    Returns:
        H.
    """
    return MODELS[body].width


def image_weights(body: str, width: int | None) -> int:
    """How many private weights a client with an image model has.

    Args:
        body: the model's name.
        width: m, of the projection; None: there is none.

    Returns:
        Those of body and projection; the head's are left out.
    """
    made = MODELS[body]
    with torch.device("meta"):
        own = sum(weight.numel() for weight in made.body().parameters())
    return own + (0 if width is None else (made.width + 1) * width)
