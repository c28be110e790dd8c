"""The bodies of FedLog's clients: which architecture each has, and the form of the features that every body gives.

    one model       every client begins from the recipe's model, or from an adapter in it (``over``)
    ``bodies``      each client's key draws an image model; bodies of one architecture begin alike

Bodies of unlike widths need ``features``, so that all feed one head. A process holds one body at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fedferret.algorithms.fedlog_messages import FedLogClient, FedLogEntry, FedLogPublic, FedLogServer, FedLogSums
from fedferret.algorithms.over import OverAdapter
from fedferret.core import tree
from fedferret.core.errors import UserError, nearest
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.trajectory_matching import physical_memory
from fedferret.models.adapters import prefix_of
from fedferret.models.catalogue import IMAGE_MODELS
from fedferret.models.classifiers import Classifier, ImageClassifier
from fedferret.models.private_body import (
    BASE,
    FeatureForm,
    Normalise,
    PrivateBodyClassifier,
    image_features,
    image_weights,
)

MOST_FEATURES = 65_536  # more than any body is wide; η has so many numbers for each class
_COPIES = 5  # of a body in training: itself, its first values, gradients and two moments


@dataclass(frozen=True, kw_only=True)
class PrivateBodies(OverAdapter[FedLogPublic, FedLogServer, FedLogClient, FedLogEntry, FedLogSums]):
    """Base of FedLog: what stays at the clients."""

    has_global_model: ClassVar[bool] = False
    features: int | None = None  # m, of a linear map before the head; none: the body's own width, without a map
    normalise: Normalise = "l2"  # the family's variance is 1/2 a feature: long features make η a cosine classifier
    clamp: float | None = None  # b: no feature is larger, which bounds what one example adds; privacy alone needs it
    bodies: tuple[str, ...] = ()  # image models, one drawn for each client; none: the recipe's model

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features is not None and not 1 <= self.features <= MOST_FEATURES:
            raise UserError(f"features={self.features}: allowed are 1 to {MOST_FEATURES:,}, such as 50")
        if self.clamp is not None and not self.clamp > 0:
            raise UserError(f"clamp={self.clamp}: must be greater than 0")
        for name in self.bodies:
            if name not in IMAGE_MODELS:
                raise UserError(f'bodies: "{name}" is no image model; {nearest(name, IMAGE_MODELS)}')
        if self.bodies and self.over is not None:
            raise UserError("bodies and over: an adapter belongs to one model; give one of the two")
        widths = {name: image_features(name) for name in self.bodies}
        if len(set(widths.values())) > 1 and self.features is None:
            made = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise UserError(f"bodies make different numbers of features ({made}); give features, such as features=50")

    @property
    def objectives(self) -> tuple[str, ...]:
        """Classification: statistics go by class."""
        return ("classification",)

    @property
    def form(self) -> FeatureForm:
        """What becomes of a body's features."""
        return FeatureForm(self.features, self.normalise, self.clamp)

    def sensitivity(self, width: int) -> float | None:
        """How far one example more or fewer moves the sums: Δ = √(1 + r²), where r bounds the norm of its features.

        Args:
            width: m.

        Returns:
            Δ, with ``clamp`` alone √(1 + m b²); an example that changes its class moves them by √2 Δ. None: unbounded.
        """
        bound = self.form.bound(width)
        return None if bound is None else math.sqrt(1 + bound**2)

    def check(self, model: nn.Module, rounds: int) -> None:
        """The adapter must be possible; and a body that never changes has the same statistics every round."""
        assert isinstance(model, PrivateBodyClassifier)  # prepared
        inner: Any = model.inner
        if self._tuner:
            self._tuner.check(inner, rounds)
        if prefix_of(inner, 1) is not None:
            raise UserError("over: a learned prompt cannot be a private body; choose an adapter such as fedit or ssf")
        if self.bodies and not any(weight.requires_grad for weight in inner.parameters()):
            raise UserError('bodies: model.train="head" freezes the body, and these train; leave train out')
        if self.features is not None:
            self._check_memory(model)
        if rounds > 1 and not model.private():
            raise UserError(
                f"rounds={rounds}: the body is frozen, so a client's statistics are the same every round; set rounds=1 "
                f"and clients.per_round to all clients, or train a part of the body with features or over"
            )

    def _check_memory(self, model: PrivateBodyClassifier) -> None:
        """Refuse maps to features that cannot be trained here. Raises UserError."""
        own = sum(weight.numel() for weight in model.private().values())
        body = max((image_weights(name, self.features) for name in self.bodies), default=own)
        needed, there = 4 * (_COPIES * body + sum(each.numel() for each in model.head.parameters())), physical_memory()
        if needed > there:
            raise UserError(
                f"features={self.features}: a private body has {body:,} weights, which take about {needed / 1e9:.1f} "
                f"GB in training, and this machine has {there / 1e9:.1f} GB; lower features"
            )

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The body, with an adapter if one is asked for, under a projection and a head with a bias."""
        if not isinstance(model, Classifier):
            raise UserError(f"fedlog needs a classifier, not a {type(model).__name__}: set objective.name")
        if self.bodies and not isinstance(model, ImageClassifier):
            raise UserError("bodies: these are image models, and the recipe's model reads texts; leave bodies out")
        prepared: Any = super().prepare(model, key)
        return PrivateBodyClassifier(prepared, self.form, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The plain architecture, where it has a place for what was tuned."""
        return super().release(body_of(model).plain())

    def init_client(self, task: Task, public: FedLogPublic, data: Examples, key: Key) -> FedLogClient:
        """The first weights, the same for all clients of an architecture; the client's key draws which."""
        body = key.fold("body").sample(self.bodies, 1)[0] if self.bodies else BASE
        model = body_of(task.model)
        model.start(body)
        return FedLogClient(body, tree.clone(model.private()))

    @contextmanager
    def model(
        self, task: Task, public: FedLogPublic, client: FedLogClient | None = None
    ) -> Iterator[PrivateBodyClassifier | None]:
        """A client's body under the public head; there is no other model, unless the body is frozen."""
        model = body_of(task.model)
        if client is None and (self.bodies or model.private()):
            yield None
            return
        if client is not None:
            model.hold(client.body, client.weights)
        with torch.no_grad():
            model.head.weight.copy_(public.head[:, :-1])
            model.head.bias.copy_(public.head[:, -1])
        yield model


def body_of(model: nn.Module) -> PrivateBodyClassifier:
    """See a working model as what ``prepare`` made.

    Args:
        model: of a task that was prepared.

    Returns:
        ``model`` itself.
    """
    assert isinstance(model, PrivateBodyClassifier)
    return model
