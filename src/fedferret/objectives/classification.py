"""Classification of texts and of images: a model with a linear head names one of the recipe's classes.

    logits = W · features(text or image) + b          loss: the mean cross-entropy, nats per example

The head is part of the model: a method that tunes all weights tunes and sends it like any other weight, and adapters
leave it dense and train it beside their own. Its first values follow from the architecture alone (docs/models.md).

Figures, all from sums that add up over any split of the data:

    accuracy             examples with the right class as the most likely
    macro-f1             2 hits / (examples + predictions) of each class, the mean over classes that occur in either
    calibration-error    Σ over 15 equal bins of confidence: |hits − summed confidence| / examples (Guo et al., "On
                         Calibration of Modern Neural Networks", ICML 2017, equation 3)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fedferret import models
from fedferret.core.errors import UserError
from fedferret.core.metrics import LARGEST_LOSS
from fedferret.data.examples import Example, FederatedData
from fedferret.data.label_checks import check_labels
from fedferret.data.labelled_batches import LabelledImages, LabelledTexts, cut_texts
from fedferret.data.text import TextSettings
from fedferret.models.adapters import prefix_of
from fedferret.models.catalogue import IMAGE_MODELS
from fedferret.models.positions import check_positions
from fedferret.objectives.interface import Encode, Loaded, ModelObjective
from fedferret.objectives.probes import check_tokens, has_every_token

if TYPE_CHECKING:
    from fedferret.models import LoadedClassifier

BINS = 15
_BY_CLASS, _BY_BIN = ("true", "predicted", "hit"), ("binned", "confidence", "right")


@dataclass(frozen=True, kw_only=True)
class Classification(ModelObjective):
    """Cross-entropy over the classes."""

    name: ClassVar[str] = "classification"
    primary: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    scores_clients: ClassVar[bool] = True

    classes: tuple[str, ...] = ()  # in the order of the logits; a source that ships in a package brings its own
    pooling: Literal["cls", "mean", "last"] | None = None  # of a text's hidden states; none: the architecture's own

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise UserError(
                f"classes={list(self.classes)}: name at least two, as the data's labels have them, such as "
                f'classes=["no", "yes"]'
            )
        repeated = [name for name, count in Counter(self.classes).items() if count > 1]
        if repeated:
            raise UserError(f'classes: "{repeated[0]}" stands there twice')

    @cached_property
    def sums(self) -> Mapping[str, float]:
        """The summed loss in nats, and counts by class and by bin of confidence."""
        by_class = [f"{what} {number}" for what in _BY_CLASS for number in range(len(self.classes))]
        by_bin = [f"{what} {number}" for what in _BY_BIN for number in range(BINS)]
        return {"loss": LARGEST_LOSS, **dict.fromkeys([*by_class, *by_bin], 1.0)}

    def check_sums(self, sums: Mapping[str, float]) -> None:
        """Refuse counts that no predictions can give. Raises ValueError."""
        super().check_sums(sums)
        for name in self.sums.keys() - {"loss"}:
            whole = name.startswith("confidence") or sums[name] == math.floor(sums[name])
            if sums[name] < 0 or not whole:
                raise ValueError(f"the sum {name!r} is {sums[name]:g}: must be a count")
        parts = {what: [sums[f"{what} {number}"] for number in range(len(self.classes))] for what in _BY_CLASS}
        bins = {what: [sums[f"{what} {number}"] for number in range(BINS)] for what in _BY_BIN}
        for name, total in (("true", parts), ("predicted", parts), ("binned", bins)):
            if sum(total[name]) != sums["count"]:
                raise ValueError(f"the sums {name!r} add up to {sum(total[name]):g}, and 'count' is {sums['count']:g}")
        fit = all(map(_at_most, parts["hit"], parts["true"])) and all(map(_at_most, parts["hit"], parts["predicted"]))
        fit = fit and all(map(_at_most, bins["right"], bins["binned"])) and sum(bins["right"]) == sum(parts["hit"])
        if not fit or not all(map(_at_most, bins["confidence"], bins["binned"])):
            raise ValueError("the sums contradict each other: more is right than there is")

    def by_example(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each example; every example is one target.

        Args:
            model: a classifier (``models/classifiers.py``), with or without an adapter.
            batch: ``labels``, int64, shape (B,), and ``input_ids`` and ``attention_mask`` or ``pixels``.

        Returns:
            Nats, float64, shape (B,), with a gradient; and B ones. Both in the processor's memory.
        """
        logits_BC, labels_B = (each.cpu() for each in self._logits(model, batch))  # Apple's devices have no fp64
        return functional.cross_entropy(logits_BC.double(), labels_B, reduction="none"), torch.ones_like(labels_B)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean cross-entropy of a batch, nats per example, fp32, with a gradient."""
        logits_BC, labels_B = self._logits(model, batch)
        return functional.cross_entropy(logits_BC.float(), labels_B)

    def features(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """What the head reads, for methods that send statistics of it.

        Args:
            model: as in ``by_example``.
            batch: as in ``by_example``, N examples.

        Returns:
            Features, fp32, shape (N, H), and labels, int64, shape (N,).
        """
        device = next(model.parameters()).device
        return model.features(batch), batch.labels.to(device)  # type: ignore[operator]  # a classifier

    def scores(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Sums over a batch: ``count``, ``loss``, and counts by class and by bin of confidence."""
        logits_BC, labels_B = (each.detach().cpu() for each in self._logits(model, batch))
        logits_BC = logits_BC.double()
        if not logits_BC.isfinite().all():  # the most likely class of NaN would be the first
            return {"count": float(len(labels_B)), **dict.fromkeys(self.sums, math.nan)}
        confidence_B, guess_B = logits_BC.softmax(dim=1).max(dim=1)
        right_B = (guess_B == labels_B).double()
        bin_B = (confidence_B * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        classes, loss = len(self.classes), functional.cross_entropy(logits_BC, labels_B, reduction="sum")
        counted = {
            "true": torch.bincount(labels_B, minlength=classes),
            "predicted": torch.bincount(guess_B, minlength=classes),
            "hit": torch.bincount(labels_B, weights=right_B, minlength=classes),
            "binned": torch.bincount(bin_B, minlength=BINS),
            "confidence": torch.bincount(bin_B, weights=confidence_B, minlength=BINS),
            "right": torch.bincount(bin_B, weights=right_B, minlength=BINS),
        }
        sums = {f"{what} {number}": float(value) for what, each in counted.items() for number, value in enumerate(each)}
        return {"count": float(len(labels_B)), "loss": float(loss), **sums}

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The figures of the module's docstring.

        Args:
            sums: of ``scores``, added up.

        Returns:
            ``loss`` (nats per example), ``accuracy``, ``macro-f1``, ``calibration-error``, ``examples``.
        """
        count = max(1.0, sums["count"])
        f1 = []
        for number in range(len(self.classes)):
            occurrences = sums[f"true {number}"] + sums[f"predicted {number}"]
            if occurrences:
                f1.append(2 * sums[f"hit {number}"] / occurrences)
        gaps = (abs(sums[f"right {number}"] - sums[f"confidence {number}"]) for number in range(BINS))
        return {
            "loss": sums["loss"] / count,
            "accuracy": sum(sums[f"hit {number}"] for number in range(len(self.classes))) / count,
            "macro-f1": sum(f1) / max(1, len(f1)),
            "calibration-error": sum(gaps) / count,
            "examples": sums["count"],
        }

    def check_model(self, model: str) -> None:
        """Refuse an unknown model, and a pooling that it cannot have. Raises UserError."""
        models.check_classifier(model, self.pooling, images=model in IMAGE_MODELS)

    def resolved(self, model: str) -> Classification:
        """With the model's own pooling, where none is given. Raises UserError for an unknown model."""
        pooling: Any = models.own_pooling(model) if self.pooling is None else self.pooling
        return replace(self, pooling=pooling)

    def text_settings(self, model: str) -> frozenset[str]:
        """The length of a text; an image has none."""
        return frozenset() if model in IMAGE_MODELS else super().text_settings(model)

    def check(self, model: str, text: TextSettings) -> None:
        """Refuse an unknown model, a pooling that it cannot have, and packed batches. Raises UserError."""
        if text.packed:
            raise UserError("text.packed=true: a class is read off one row per text; set packed=false")
        super().check(model, text)

    def check_tuned(self, name: str, model: nn.Module, text: TextSettings, longest: int) -> None:
        """Refuse texts that do not fit behind a learned prompt. Raises UserError."""
        prompt = prefix_of(model, 1)
        if prompt is not None:
            check_positions(name, model.encoder, text.max_tokens, prompt.shape[1])  # type: ignore[arg-type]

    def check_examples(self, model: str, data: FederatedData, complete: bool = True) -> None:
        """Refuse images where the model reads text, the reverse, and labels that are no classes. Raises UserError."""
        first = next((each for part in (data.clients, data.held_out) for rows in part.values() for each in rows), None)
        images = model in IMAGE_MODELS if first is None else first.image is not None
        models.check_classifier(model, self.pooling, images=images)
        held_out = {**data.held_out, **{f"of client {client}": rows for client, rows in data.kept.items()}}
        check_labels(data.clients, held_out, self.classes, images=images, complete=complete)

    def skeleton(self, model: str) -> nn.Module:
        """The classifier on the meta device."""
        return models.classifier_skeleton(model, len(self.classes), self.pooling)

    def load(self, model: str, device: str, log: Callable[[str], None]) -> LoadedClassifier:
        """The classifier, with a tokenizer where it reads text."""
        return models.classifier(model, len(self.classes), self.pooling, device=device, log=log)

    def encoder(self, loaded: Loaded, text: TextSettings) -> Encode:
        """Texts as the tokenizer's own tokens, cut at the end; images as they are."""
        tokenizer, limit = loaded.tokenizer, getattr(loaded, "max_tokens", None)
        if limit is not None and text.max_tokens > limit:
            raise UserError(f"text.max_tokens={text.max_tokens}: {loaded.name} reads at most {limit} tokens of a text")

        def encode(examples: Sequence[Example], for_training: bool) -> LabelledTexts | LabelledImages:
            if tokenizer is None:
                return LabelledImages.of(examples, self.classes)
            texts = LabelledTexts.of(examples, tokenizer, text.max_tokens, self.classes)
            check_tokens(loaded, loaded.model.encoder, texts.largest_token)
            return texts

        return encode

    def check_encoding(self, loaded: Loaded, text: TextSettings, data: FederatedData) -> tuple[str, ...]:
        """Say how much of the texts ``max_tokens`` cuts off, and that tools are not read."""
        if loaded.tokenizer is None:
            return ()
        parts = [part for part in (*data.clients.values(), *data.held_out.values(), *data.kept.values()) if part]
        offering = sum("tools" in example.metadata for part in parts for example in part)
        unread = (f"{offering:,} texts to classify come with tools, which are not read",) if offering else ()
        return (*unread, *cut_texts(parts, loaded.tokenizer, text.max_tokens))

    def reads_every_token(self, loaded: Loaded) -> bool:
        """Compare the tokenizer with the embedding."""
        return loaded.tokenizer is None or has_every_token(loaded, loaded.model.encoder)

    def save(self, loaded: Any, folder: Path, max_tokens: int | None = None) -> str:
        """A sequence-classification folder of transformers where there is one for this model, with its labels."""
        return models.save_classifier(loaded, self.classes, folder, max_tokens)

    def freeze(self, model: nn.Module) -> None:
        """Leave only the head to be trained."""
        model.freeze()  # type: ignore[operator]  # a classifier

    def _logits(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits_BC = model(batch)
        return logits_BC, batch.labels.to(logits_BC.device)


def _at_most(part: float, whole: float) -> bool:
    return part <= whole * (1 + 1e-9)
