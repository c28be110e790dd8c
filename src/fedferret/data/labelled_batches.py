"""Labelled texts and images to tensors: compact storage, and batches in the order of ``data/order.py``.

Storage: 4 bytes per token, or 1 byte per pixel, and 8 bytes per label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedferret.core.errors import UserError, nearest
from fedferret.core.text import printable
from fedferret.data.examples import Example, check_at_least
from fedferret.data.order import grouped, longest_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedferret.core.keys import Key


_SAMPLE = 400  # texts that are tokenised before work


@dataclass(frozen=True)
class TextBatch:
    """B texts, padded on the right to the longest of T tokens; int64. ``attention_mask`` is 1 on tokens."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    labels: Tensor  # (B,)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class ImageBatch:
    """B images of C channels, H rows and W columns."""

    pixels: Tensor  # (B, C, H, W), fp32 in [0, 1]
    labels: Tensor  # (B,), int64

    def __len__(self) -> int:
        return self.pixels.shape[0]


class LabelledTexts:
    """The texts of one client or one held-out set: a flat int32 tensor of tokens, lengths and labels."""

    def __init__(self, ids: Tensor, lengths: Tensor, labels: Tensor, pad_id: int = 0) -> None:
        """Store texts in compact form.

        Args:
            ids: tokens of all texts in a row, int32, shape (tokens,).
            lengths: tokens of each text, at least 1, int64, shape (texts,).
            labels: index of each text's class, int64, shape (texts,).
            pad_id: the token that fills a row behind the text.
        """
        self._ids, self._lengths, self._labels, self._pad_id = ids, lengths, labels, pad_id

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        classes: Sequence[str],
    ) -> LabelledTexts:
        """Tokenise labelled texts.

        Args:
            examples: a prompt, and the name of a class as the response.
            tokenizer: the model's; adds its special tokens.
            max_tokens: tokens per text, special tokens included; the end of a longer text is cut.
            classes: names of the classes, in the order of their indices.

        Returns:
            The texts in the order of ``examples``.

        Raises:
            UserError: an image, an empty text, a label that is no class, or a ``max_tokens`` below 1.
        """
        check_at_least("max_tokens", max_tokens, 1)
        labels = labels_of(examples, classes, images=False)
        texts = [example.prompt for example in examples]
        ids = _cut(tokenizer, texts, max_tokens) if texts else []
        without = sum(not each for each in ids)
        if without:
            raise UserError(f"{without:,} of {len(ids):,} texts have no token: fill them or remove their rows")
        pad_id = tokenizer.pad_token_id
        return cls(
            torch.tensor([token for each in ids for token in each], dtype=torch.int32),
            torch.tensor([len(each) for each in ids], dtype=torch.int64),
            torch.tensor(labels, dtype=torch.int64),
            0 if pad_id is None else int(pad_id),
        )

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each text."""
        lengths: list[int] = self._lengths.tolist()
        return lengths

    @property
    def largest_token(self) -> int:
        """The largest number of a token, that of padding included."""
        return max(self._pad_id, int(self._ids.max()) if len(self._ids) else 0)

    @property
    def longest_first(self) -> list[int]:
        """Indices of the texts in evaluation order: longest first."""
        return longest_first(self.lengths)

    def take(self, rows: Sequence[int]) -> LabelledTexts:
        """Choose texts.

        Args:
            rows: indices from 0, which may repeat.

        Returns:
            A copy of the texts with these indices, in this order.
        """
        pieces, chosen = torch.split(self._ids, self.lengths), list(rows)
        ids = torch.cat([pieces[row] for row in chosen]) if chosen else self._ids[:0]
        return LabelledTexts(ids, self._lengths[chosen], self._labels[chosen], self._pad_id)

    def batches(self, size: int, key: Key | None) -> Iterator[TextBatch]:
        """One pass over the texts.

        Args:
            size: texts per batch.
            key: draws which texts share a batch, and the order of the batches. None gives evaluation order, longest
                first.

        Returns:
            Every text once, in batches of ``size``; one batch may be smaller.
        """
        pieces = torch.split(self._ids, self.lengths)
        for rows in grouped(self.lengths, size, key):
            longest = max(len(pieces[row]) for row in rows)
            input_ids = torch.full((len(rows), longest), self._pad_id, dtype=torch.int64)
            attention_mask = torch.zeros_like(input_ids)
            for place, row in enumerate(rows):
                input_ids[place, : len(pieces[row])] = pieces[row]
                attention_mask[place, : len(pieces[row])] = 1
            yield TextBatch(input_ids, attention_mask, self._labels[rows])


class LabelledImages:
    """The images of one client or one held-out set, all of one shape: a uint8 tensor, and labels."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        """Store images.

        Args:
            pixels: uint8, shape (examples, channels, height, width).
            labels: index of each image's class, int64, shape (examples,).
        """
        self._pixels, self._labels = pixels, labels

    @classmethod
    def of(cls, examples: Sequence[Example], classes: Sequence[str]) -> LabelledImages:
        """Put labelled images into one tensor.

        Args:
            examples: an image, and the name of a class as the response.
            classes: names of the classes, in the order of their indices.

        Returns:
            The images in the order of ``examples``.

        Raises:
            UserError: a text, images of several shapes, or a label that is no class.
        """
        labels = torch.tensor(labels_of(examples, classes, images=True), dtype=torch.int64)
        images = [example.image for example in examples if example.image is not None]
        if not images:
            return cls(torch.zeros(0, 1, 1, 1, dtype=torch.uint8), labels)
        shapes = Counter(image.shape for image in images)
        if len(shapes) > 1:
            given = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
            raise UserError(f"the images have several shapes ({given}): give all images one shape")
        flat = torch.frombuffer(bytearray(b"".join(image.pixels for image in images)), dtype=torch.uint8)
        return cls(flat.view(len(images), *images[0].shape), labels)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def longest_first(self) -> list[int]:
        """Indices of the images in evaluation order, which is their order."""
        return list(range(len(self)))

    def take(self, rows: Sequence[int]) -> LabelledImages:
        """Choose images.

        Args:
            rows: indices from 0, which may repeat.

        Returns:
            A copy of the images with these indices, in this order.
        """
        return LabelledImages(self._pixels[list(rows)], self._labels[list(rows)])

    def batches(self, size: int, key: Key | None) -> Iterator[ImageBatch]:
        """One pass over the images.

        Args:
            size: images per batch.
            key: draws which images share a batch, and the order of the batches. None gives the order of the images.

        Returns:
            Every image once, in batches of ``size``; one batch may be smaller.
        """
        for rows in grouped([1] * len(self), size, key):
            yield ImageBatch(self._pixels[rows].float() / 255, self._labels[rows])


def _cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    """Tokens of each text with special tokens; a long text loses its end, whichever side the tokenizer would cut."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        encoded = tokenizer(texts, truncation=True, max_length=max_tokens, return_attention_mask=False, verbose=False)
    finally:
        tokenizer.truncation_side = side
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def labels_of(examples: Sequence[Example], classes: Sequence[str], *, images: bool) -> list[int]:
    """The index of each example's class.

    Args:
        examples: labelled texts or images.
        classes: names of the classes, in the order of their indices.
        images: whether the examples must have images; else they must have texts.

    Returns:
        Indices into ``classes``, in the order of ``examples``.

    Raises:
        UserError: an image where text is expected or the reverse, an empty text, or a label that is no class.
    """
    wrong = sum((example.image is not None) != images for example in examples)
    if wrong:
        found, wanted = ("texts", "images") if images else ("images", "texts")
        raise UserError(
            f"{wrong:,} of {len(examples):,} examples are {found} and the model reads {wanted}: "
            f"choose a model for {found}, or data of {wanted}"
        )
    if not images and any(len(example.turns) == 1 for example in examples):
        raise UserError(
            "the rows were read as texts without classes: set data.prompt_column to the column of texts and "
            "data.response_column to that of classes"
        )
    empty = 0 if images else sum(not example.prompt.strip() for example in examples)
    if empty:
        raise UserError(f"{empty:,} of {len(examples):,} texts are empty: fill them or remove their rows")
    index = {name: number for number, name in enumerate(classes)}
    unknown = Counter(example.response for example in examples if example.response not in index)
    if unknown:
        label, count = unknown.most_common(1)[0]
        rows = "1 row" if count == 1 else f"{count:,} rows"
        raise UserError(f'label "{printable(label, 60)}" ({rows}) is no class: {nearest(label, classes)}')
    return [index[example.response] for example in examples]


def cut_texts(
    parts: Sequence[Sequence[Example]], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[str, ...]:
    """Find out what ``max_tokens`` cuts off texts.

    Args:
        parts: of all clients and held-out sets, each with an example.
        tokenizer: the model's.
        max_tokens: tokens per text, special tokens included.

    Returns:
        A line for the user on all texts, or on a sample; none where all fit.
    """
    total, passed = sum(map(len, parts)), 0
    step = max(1, -(-total // _SAMPLE))
    lengths: list[int] = []
    for part in parts:
        texts = [part[index].prompt for index in range(-passed % step, len(part), step)]
        lengths += map(len, tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        passed += len(part)
    cut = [length for length in lengths if length > max_tokens]
    if not cut:
        return ()
    of = f"all {total:,} texts" if step == 1 else f"{len(lengths):,} of {total:,} texts"
    lost = 1 - len(cut) * max_tokens / sum(cut)
    how = f"{len(cut):,} at the end ({lost:.0%} of their tokens are lost)"
    return (f"text.max_tokens={max_tokens} cuts, of {of}, {how}",)
