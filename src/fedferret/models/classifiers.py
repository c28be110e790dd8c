"""A model that classifies: features of an example, and a linear head that maps them to one logit per class.

    logits_NC = head(features_NH)

Features of a text are pooled from the hidden states of its tokens:

    "cls"    the architecture's pooler where it has one, else the first token's hidden state
    "mean"   the mean over tokens
    "last"   the last token's

A token is padding where the attention mask is 0, whatever its number. Vectors of a learned prompt stand before the text
and take the first positions; no pooling reads them: "cls" reads the text's own first token.

Features of an image are what the body makes of the resized and normalised pixels, so that data stay raw. Features are
fp32. Buffers never change.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedferret.core.errors import UserError
from fedferret.models.positions import position_limit

POOLINGS = ("cls", "mean", "last")
HEAD = "head."  # begins the names of a classifier's head, and of nothing else in it
_LUMA = (0.299, 0.587, 0.114)  # the brightness of red, green and blue (ITU-R BT.601)


class Classifier(nn.Module, ABC):
    """Features, and a linear head with C classes; a subclass sets the head last, so its weights are the last.

    Attributes:
        head: maps the H features to the C logits.
    """

    head: nn.Linear

    @abstractmethod
    def features(self, batch: Any) -> Tensor:
        """What the head reads.

        Args:
            batch: of N examples, on any device; a subclass says which attributes are read.

        Returns:
            Features, fp32, shape (N, H), on the model's device.

        Raises:
            UserError: if the model cannot read such a batch.
        """

    def input_shape(self, tokens: int) -> tuple[int, ...]:
        """The form in which the body reads one example, where that is continuous: pixels, or vectors of tokens.

        Args:
            tokens: of a text; an image has none.

        Returns:
            The shape without N, for ``features_of``.

        Raises:
            UserError: the body reads nothing continuous.
        """
        raise UserError(f"a {type(self).__name__} reads no continuous inputs; choose another model")

    @property
    def input_scale(self) -> float:
        """The standard deviation of the values in such a form."""
        return 1.0

    def features_of(self, inputs: Tensor) -> Tensor:
        """What the head reads, of examples in the form that the body reads.

        Args:
            inputs: fp32, shape (N, *``input_shape``), on the model's device; a gradient reaches them.

        Returns:
            Features, fp32, shape (N, H), on the model's device.
        """
        raise NotImplementedError

    def forward(self, batch: Any) -> Tensor:
        """The logits of a batch.

        Args:
            batch: as in ``features``, or a tensor as in ``features_of``.

        Returns:
            Logits, shape (N, C), on the model's device.
        """
        features_NH = self.features_of(batch) if isinstance(batch, Tensor) else self.features(batch)
        logits_NC: Tensor = self.head(features_NH)
        return logits_NC

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.parameters()).device

    def get_output_embeddings(self) -> nn.Linear:
        """The head, under the name that transformers has for it.

        Returns:
            The head; a method that adapts all linear modules leaves it out.
        """
        return self.head

    def freeze(self) -> None:
        """Everything but the head stops requiring a gradient, so that the head alone is tuned."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)


class TextClassifier(Classifier):
    """A transformer without output head, a pooling, and a linear head.

    Attributes:
        encoder: the transformer.
        pooling: "cls", "mean" or "last".
        prompt: makes the V vectors, shape (V, E), that stand before every text's embeddings; None: there are none.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear, pooling: str) -> None:
        """Join the parts.

        Args:
            encoder: a transformers encoder or decoder; its pooler is removed unless the pooling is "cls".
            head: maps the hidden width to the classes.
            pooling: "cls", "mean" or "last".
        """
        super().__init__()
        parts: Any = encoder
        if pooling != "cls" and getattr(parts, "pooler", None) is not None:
            parts.pooler = None  # weights that no gradient reaches
        self.prompt: nn.Module | None = None
        self.encoder, self.pooling, self.head = encoder, pooling, head
        # a cache of keys and values is of use to generation alone
        cached = "use_cache" in inspect.signature(encoder.forward).parameters
        self._options = {"use_cache": False} if cached else {}

    def features(self, batch: Any) -> Tensor:
        """Pooled hidden states.

        Args:
            batch: ``input_ids`` and ``attention_mask``, int64, shape (N, T), on any device.

        Returns:
            Features, fp32, shape (N, H), on the model's device.
        """
        ids_NT, mask_NT = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        return self._features(self._inputs(ids_NT, mask_NT), mask_NT)

    def input_shape(self, tokens: int) -> tuple[int, ...]:
        """Embeddings, shape (T, E). Raises UserError where the transformer takes none, or not so many."""
        if "inputs_embeds" not in inspect.signature(self.encoder.forward).parameters:
            raise UserError(f"a {type(self.encoder).__name__} takes tokens and no embeddings; choose another model")
        limit = position_limit(self.encoder)
        if limit is not None and tokens > limit:
            raise UserError(f"tokens={tokens}: the model has {limit:,} positions; set at most that")
        return tokens, self._embedding.embedding_dim

    @property
    def input_scale(self) -> float:
        """Of the tokens' embeddings."""
        return float(self._embedding.weight.detach().float().std())

    def features_of(self, inputs: Tensor) -> Tensor:
        """Pooled hidden states of texts of T embeddings, shape (N, T, E); there is no padding."""
        mask_NT = inputs.new_ones(inputs.shape[:2], dtype=torch.int64)
        embedded = self._embedded(inputs.to(self._embedding.weight.dtype), mask_NT)
        # without a mask, which would hide nothing, a forward pass asks for no value: it runs on the meta device too
        return self._features({"inputs_embeds": embedded["inputs_embeds"]}, mask_NT)

    @property
    def _embedding(self) -> nn.Embedding:
        encoder: Any = self.encoder
        embedding: nn.Embedding = encoder.get_input_embeddings()
        return embedding

    def _features(self, inputs: dict[str, Tensor], mask_NT: Tensor) -> Tensor:
        output = self.encoder(**inputs, **self._options)
        pooled = getattr(output, "pooler_output", None)
        if self.pooling == "cls" and pooled is not None:
            features_NH: Tensor = pooled if self.prompt is None else self._pooled(output.last_hidden_state, mask_NT)
            return features_NH.float()
        hidden_NTH: Tensor = output.last_hidden_state[:, -mask_NT.shape[1] :].float()
        if self.pooling == "mean":
            mask_NT1: Tensor = mask_NT[:, :, None].to(hidden_NTH.dtype)
            return (hidden_NTH * mask_NT1).sum(dim=1) / mask_NT1.sum(dim=1).clamp(min=1)
        if self.pooling == "last":
            places_T = torch.arange(mask_NT.shape[1], device=self.device)
            last_N = (mask_NT * places_T).argmax(dim=1)
            return hidden_NTH[torch.arange(len(last_N), device=self.device), last_N]
        return hidden_NTH[:, 0]

    def _inputs(self, ids_NT: Tensor, mask_NT: Tensor) -> dict[str, Tensor]:
        """The tokens, or the V vectors and the tokens' embeddings."""
        if self.prompt is None:
            return {"input_ids": ids_NT, "attention_mask": mask_NT}
        return self._embedded(self._embedding(ids_NT), mask_NT)

    def _embedded(self, embeddings_NTE: Tensor, mask_NT: Tensor) -> dict[str, Tensor]:
        """The V vectors, if any, and the embeddings."""
        if self.prompt is None:
            return {"inputs_embeds": embeddings_NTE, "attention_mask": mask_NT}
        prompt_VE: Tensor = self.prompt()
        prompt_NVE = prompt_VE.to(embeddings_NTE.dtype).expand(len(embeddings_NTE), -1, -1)
        return {
            "inputs_embeds": torch.cat((prompt_NVE, embeddings_NTE), dim=1),
            "attention_mask": torch.cat((mask_NT.new_ones(prompt_NVE.shape[:2]), mask_NT), dim=1),
        }

    def _pooled(self, hidden_NTH: Tensor, mask_NT: Tensor) -> Tensor:
        """What the architecture's pooler makes of the text without the prompt."""
        pooler: Any = self.encoder.pooler
        pooled_NH: Tensor = pooler(hidden_NTH[:, -mask_NT.shape[1] :])
        return pooled_NH


class ImageClassifier(Classifier):
    """A body that makes features of images of one size, and a linear head."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, head: nn.Linear, channels: int, size: int, mean: float, std: float) -> None:
        """Join the parts.

        Args:
            body: maps pixels of shape (N, ``channels``, ``size``, ``size``) to features of shape (N, H).
            head: maps the features to the classes.
            channels: 1 or 3.
            size: height and width that the body reads, in pixels.
            mean: of a pixel; it is subtracted.
            std: of a pixel; the difference is divided by it.
        """
        super().__init__()
        self.body, self.head = body, head
        self.channels, self.size = channels, size
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def features(self, batch: Any) -> Tensor:
        """What the body makes of the images.

        Args:
            batch: ``pixels`` in [0, 1], fp32, shape (N, 1 or 3, height, width), on any device.

        Returns:
            Features, fp32, shape (N, H), on the model's device.

        Raises:
            UserError: if images have neither one channel nor three.
        """
        return self.features_of(self.prepared(batch.pixels.to(self.device)))

    def input_shape(self, tokens: int) -> tuple[int, ...]:
        """Normalised pixels, shape (``channels``, ``size``, ``size``)."""
        return self.channels, self.size, self.size

    def features_of(self, inputs: Tensor) -> Tensor:
        """What the body makes of normalised pixels."""
        features_NH: Tensor = self.body(inputs)
        return features_NH.float()

    def prepared(self, pixels_NCHW: Tensor) -> Tensor:
        """The images in the form that the body reads.

        One channel is repeated to three; three become one, their brightness. Images are resized bilinearly, with
        antialiasing where they shrink.

        Args:
            pixels_NCHW: in [0, 1], fp32, on the model's device.

        Returns:
            Normalised pixels, shape (N, ``channels``, ``size``, ``size``).

        Raises:
            UserError: if images have neither one channel nor three.
        """
        given, size = pixels_NCHW.shape[1], (self.size, self.size)
        if given not in (1, 3):
            raise UserError(f"images have {given} channels; allowed: 1 (brightness) or 3 (red, green, blue)")
        if given > self.channels:
            luma_C11 = pixels_NCHW.new_tensor(_LUMA)[:, None, None]
            pixels_NCHW = (pixels_NCHW * luma_C11).sum(dim=1, keepdim=True)
        if pixels_NCHW.shape[2:] != size:
            pixels_NCHW = functional.interpolate(pixels_NCHW, size, mode="bilinear", antialias=True)
        return ((pixels_NCHW - self.mean) / self.std).expand(-1, self.channels, -1, -1)


def inner_transformer(model: nn.Module) -> tuple[str, nn.Module]:
    """Look inside a classifier.

    Args:
        model: of any kind.

    Returns:
        The name within ``model``, with a dot where it is not empty, and the encoder or the body; ``model`` itself where
        it is no classifier.
    """
    if isinstance(model, Classifier):
        for name, child in model.named_children():
            if child is not model.head:
                return f"{name}.", child
    return "", model
