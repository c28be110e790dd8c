"""Features of a frozen body, computed once per example of a process: a round that tunes a head takes milliseconds.

    features(batch) = [known[example] for example in batch], known[example] computed when the example first comes

Each example is computed by itself, so its features depend neither on the padding nor on the other examples of the
batch in which it first came. What a method sends and learns is the same but for the last bits. Where any weight below
the head takes a gradient, features are computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedferret.models.classifiers import HEAD, Classifier, ImageClassifier, TextClassifier

Features: TypeAlias = Callable[[Any, Any], Tensor]
Examples: TypeAlias = Callable[[Any], Iterator[tuple[bytes, Any]]]


@contextmanager
def remembered(known: dict[bytes, Tensor]) -> Iterator[None]:
    """Compute the features of classifiers with a frozen body once.

    Args:
        known: features by example, shape (H,), of one body; they are added to.
    """
    kinds: dict[Any, Examples] = {TextClassifier: _texts, ImageClassifier: _images}
    before: dict[Any, Features] = {kind: kind.features for kind in kinds}
    for kind, examples in kinds.items():
        kind.features = _remembering(before[kind], examples, known)
    try:
        yield
    finally:
        for kind, plain in before.items():
            kind.features = plain


def _remembering(plain: Features, examples: Examples, known: dict[bytes, Tensor]) -> Features:
    def features(model: Classifier, batch: Any) -> Tensor:
        if any(weight.requires_grad for name, weight in model.named_parameters() if not name.startswith(HEAD)):
            return plain(model, batch)
        rows = []
        for name, example in examples(batch):
            if name not in known:
                with torch.no_grad():
                    known[name] = plain(model, example)[0].clone()
            rows.append(known[name])
        return torch.stack(rows)

    return features


def _texts(batch: Any) -> Iterator[tuple[bytes, Any]]:
    """The texts of a batch, without padding, each by its tokens."""
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        kept = ids[mask.bool()]
        yield kept.numpy().tobytes(), SimpleNamespace(input_ids=kept[None], attention_mask=torch.ones_like(kept)[None])


def _images(batch: Any) -> Iterator[tuple[bytes, Any]]:
    """The images of a batch, each by its pixels."""
    for pixels in batch.pixels:
        yield pixels.numpy().tobytes(), SimpleNamespace(pixels=pixels[None])
