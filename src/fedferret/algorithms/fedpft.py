"""FedPFT: clients send Gaussian mixtures of frozen features, once; the server trains the head on draws from them.

Beitollahi, Bie, Hemati, Brunswic, Li, Chen, Zhang. "Parametric Feature Transfer: One-shot Federated Learning with
Foundation Models", arXiv 2402.01862; TMLR 2025. Read from the first author's code, mahdibeit/FedPFT @2e40f3a.

    client j, class c:   x_n = features of its n_jc examples        (w, μ, Σ)_jc <- EM, K components
    server:              n_jc features from every mixture, with label c        head <- T steps of cross-entropy on all
    chain (one client a round):    client: the mixtures so far, their draws joined with its real features, fitted again

The mixtures are of what the head reads. The body is frozen, whatever ``model.train`` says.

Wire: up, for each of the client's P classes, 9 + 4 K (1 + H + S) bytes: label, count, number of components, and fp32
weights, means, covariances, with S = 1, H or H (H + 1) / 2 (spherical, diagonal, full). Down 4 (H + 1) C; in a chain
the mixtures so far too. Rare classes have fewer components.

Deviations: fp32 where the code has fp16, which hidden states overflow. One random matrix gives all draws: the code's
mixtures share their noise. A class has min(K, n // 2) components, where the code drops classes of n <= K; nothing is
sent of a class of one example, unless ``min_examples = 1``: its mean is that example. Diagonal covariances, where the
code's are spherical. Full ones send their lower half. The chain follows a third-party summary; its details are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from fedferret.algorithms.fedpft_client import Fitting
from fedferret.algorithms.fedpft_messages import (
    FedPFTClient,
    FedPFTEntry,
    FedPFTPublic,
    Mixtures,
    bytes_of,
    check_mixtures,
)
from fedferret.algorithms.fedpft_server import drawn_features, rows_of, train_head
from fedferret.algorithms.full_model import loaded
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Pooled, Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import mapped
from fedferret.core.task import Examples, Task
from fedferret.local.feature_statistics import features_of
from fedferret.local.first_order import FirstOrder
from fedferret.local.gaussian_mixtures import Kind, check_installed
from fedferret.models.classifiers import HEAD, Classifier
from fedferret.models.normalised_head import Normalise, normalise_, normalised, reach


def _head_training() -> FirstOrder:
    """The code's AdamW and epochs; its rate of 1e-4 asks for more of them."""
    return FirstOrder(optimizer="adamw", learning_rate=1e-2, clip=None, batch_size=128, epochs=50)


@dataclass(frozen=True, kw_only=True)
class FedPFT(Algorithm[FedPFTPublic, None, FedPFTClient, FedPFTEntry, Mixtures]):
    """A head from mixtures of features. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedpft"
    trains_at_clients: ClassVar[bool] = False
    weighting: ClassVar[Weighting] = "examples"  # bounds how many features a client's mixtures are drawn from
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-code": {
            "covariance": "spherical",
            "head": {"learning_rate": 1e-4, "weight_decay": 0.01, "batch_size": 32, "epochs": 50},
        },
    }
    components: int = 1  # K: the fewest bytes, the only one with a bound for differential privacy
    covariance: Kind = "diagonal"  # features of language models differ in variance: spherical loses accuracy there
    normalise: Normalise = "none"  # the head reads the features as they are, so that it fits the plain model
    floor: float = 1e-6  # added to every variance; scikit-learn's
    min_examples: int = 2  # of a class; 1 sends the feature itself as a mean, with the client's pooled variance
    max_samples: int = 100_000  # rows that the server draws in all: 150 MB of 384 features
    chain: bool = False  # one client a round, each goes on from the mixtures of the one before
    head: FirstOrder = field(default_factory=_head_training)  # at the server; on features it costs seconds

    def __post_init__(self) -> None:
        if not 1 <= self.components <= 255:
            raise UserError(f"components={self.components}: must lie between 1 and 255")
        if not 0 < self.floor < 1:
            raise UserError(f"floor={self.floor}: must be greater than 0 and below 1")
        for name in ("min_examples", "max_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.head.checkpoint_activations:
            raise UserError("head.checkpoint_activations=true: a head alone has no activations to drop; leave it out")

    @property
    def objectives(self) -> tuple[str, ...]:
        """Classification: mixtures are of a class's features."""
        return ("classification",)

    @property
    def pooling(self) -> Pooling:
        """Every client's mixtures, kept apart."""
        return Pooling.EACH

    @property
    def max_rounds(self) -> int | None:  # type: ignore[override]  # of the settings, not of the class
        """One, or in a chain one for every client that takes part."""
        return None if self.chain else 1

    @property
    def per_round(self) -> int | None:  # type: ignore[override]  # likewise
        """One client in a round of a chain."""
        return 1 if self.chain else None

    def check(self, model: nn.Module, rounds: int) -> None:
        """Clients need scikit-learn."""
        super().check(model, rounds)
        check_installed()

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with a frozen body, and a head that reads normalised features where these are asked for."""
        classifier = _classifier(model)
        classifier.freeze()
        normalise_(classifier, self.normalise)
        return model

    def release(self, model: nn.Module) -> nn.Module:
        """The model itself; no plain architecture normalises features."""
        if self.normalise != "none":
            raise UserError(f'normalise="{self.normalise}": no plain model has a place for it; set normalise="none"')
        return model

    def note(self, public: FedPFTPublic) -> str | None:
        """What a chain has gone through."""
        counts = public.mixtures.counts.tolist() if public.mixtures else []
        return f"the chain's mixtures are of {sum(counts):,} examples in {len(counts)} classes" if counts else None

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """From one class of one component to all classes of K; down the head, and in a chain the mixtures."""
        classes, width = next(shape for shape in shapes.values() if len(shape) == 2)
        least = bytes_of(1, 1, width, self.covariance)
        most = bytes_of(classes, self.components, width, self.covariance)
        head = 4 * sum(math.prod(shape) for shape in shapes.values())
        chain = int(self.chain)
        return WireCost(least, most, head + least * chain, head + most * chain, client_state_bytes=8 * chain)

    def init(self, task: Task, key: Key) -> tuple[FedPFTPublic, None]:
        """The head of the base."""
        return FedPFTPublic(task.store(tree.parameters(task.model)), None), None

    def client_update(
        self, task: Task, public: FedPFTPublic, client: FedPFTClient | None, data: Examples, key: Key
    ) -> ClientReply[FedPFTClient, Mixtures]:
        """Fit a mixture to the features of each class; in a chain to these and to draws from those before."""
        started, kept = time.perf_counter(), client
        if client and public.mixtures:  # the client's features are in there: pass on what came
            sent = mapped(Tensor.clone, public.mixtures)
        else:
            fitting = Fitting(self.components, self.covariance, self.floor, self.min_examples)
            features = [(normalised(x_NH, self.normalise), y_N) for x_NH, y_N in features_of(task, data)]
            sent = fitting.mixtures(features, public.mixtures, self.max_samples, key)
            kept = FedPFTClient(task.round) if self.chain else None
        return ClientReply(sent, kept, {"seconds": time.perf_counter() - started})

    def accept(self, task: Task, public: FedPFTPublic, payload: Mixtures) -> None:
        """Refuse mixtures that no features can have."""
        classes, width = public.weights[f"{HEAD}weight"].shape
        limits = (self.components, self.min_examples, reach(self.normalise, width))
        check_mixtures(payload, classes, width, self.covariance, *limits)

    def server_update(
        self, task: Task, public: FedPFTPublic, server: None, pooled: Pooled[Mixtures], key: Key
    ) -> tuple[None, FedPFTEntry]:
        """Draw features from every mixture and train the head on them."""
        if self.chain and len(pooled.sums) > 1:
            raise UserError(f"{len(pooled.sums)} clients in a round of a chain: set clients.per_round=1")
        rows = rows_of(pooled.sums, pooled.weights, self.max_samples)
        features = drawn_features(pooled.sums, rows, self.covariance, key.fold("samples"))
        with loaded(task, public.weights) as model:
            trained = train_head(task, _classifier(model).head, features, self.head, key.fold("head"))
            head = {name: trained.weights[name].cpu().clone() for name in public.weights}
        return None, FedPFTEntry(head, pooled.only if self.chain else None)

    def apply(self, task: Task, public: FedPFTPublic, entry: FedPFTEntry) -> None:
        """Take over the head, and the mixtures."""
        tree.copy_(public.weights, entry.head)
        public.mixtures = entry.mixtures

    @contextmanager
    def model(self, task: Task, public: FedPFTPublic, client: FedPFTClient | None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model


def _classifier(model: nn.Module) -> Classifier:
    """The model, or a UserError where it is no classifier."""
    if not isinstance(model, Classifier):
        raise UserError('fedpft sends mixtures of the features that a head reads: set objective.name="classification"')
    return model
