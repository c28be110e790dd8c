"""What every adapter does, and how a model says which adapter it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models.classifiers import Classifier

_ATTRIBUTE = "_fedferret_adapter"  # of the model that ``attach`` returned


class Adapter(ABC):
    """New weights in or around a frozen model. Subclasses are frozen dataclasses of settings."""

    merges: ClassVar[bool]  # whether the plain architecture has a place for what the adapter learned

    def attach(self, model: nn.Module, key: Key) -> nn.Module:
        """Freeze a model and add this adapter.

        Args:
            model: a model without an adapter, changed in place; on the meta device only names and shapes are made.
            key: draws the first values.

        Returns:
            ``model``, or a wrapper where the adapter is around the model; in evaluation mode.

        Raises:
            UserError: the model has an adapter, or not what this one needs.
        """
        if adapter_of(model) is not None:
            raise UserError("the model has an adapter already: a run tunes one")
        head = model.head if isinstance(model, Classifier) else None
        attached = self._attach(model, key).eval()
        if head is not None:  # of a classifier: it stays dense, and is trained and sent beside the adapter
            head.requires_grad_(True)
        setattr(attached, _ATTRIBUTE, self)
        return attached

    def merge(self, model: nn.Module) -> nn.Module:
        """Add what was learned to the frozen weights.

        Args:
            model: what ``attach`` returned; changed in place.

        Returns:
            The plain architecture; each sum is rounded once to the weights' dtype.

        Raises:
            UserError: this kind of adapter has no place in the plain architecture.
        """
        if not self.merges:
            raise UserError(f"a {type(self).__name__} cannot be merged: the plain model has no place for it")
        return self._forget(self._merge(model))

    def detach(self, model: nn.Module) -> nn.Module:
        """Remove this adapter and what was learned.

        Args:
            model: what ``attach`` returned; may be changed in place.

        Returns:
            The plain model; its weights are bit for bit those of before ``attach``, and still frozen. A classifier's
            head keeps what it learned.
        """
        return self._forget(self._detach(model))

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that training changes.

        Args:
            model: what ``attach`` returned.

        Returns:
            The trainable weights by name, those of a classifier's head among them; detached, not copied.
        """
        return tree.parameters(model)

    @abstractmethod
    def export(self, model: nn.Module, base: str, folder: Path, classes: Sequence[str] = ()) -> str:
        """Write what was learned as a folder.

        Args:
            model: what ``attach`` returned.
            base: the base model's name, which the folder refers to.
            folder: to be made; must not hold anything.
            classes: of a classifier, in the order of its logits.

        Returns:
            One line on how to load the folder.

        Raises:
            UserError: the folder is not empty, or this kind of adapter is not written alone for such a model.
        """

    def transformer(self, model: Any) -> Any:
        """Look inside a wrapper.

        Args:
            model: what ``attach`` returned.

        Returns:
            The transformers model: ``model`` itself where the adapter is no wrapper.
        """
        return model

    def prefix(self, model: Any, rows: int) -> Tensor | None:
        """The learned prompt, with a gradient.

        Args:
            model: what ``attach`` returned.
            rows: of the batch that the model reads next.

        Returns:
            The V vectors that the model reads before every row, shape (rows, V, E); None where there are none.
        """
        return None

    @abstractmethod
    def _attach(self, model: nn.Module, key: Key) -> nn.Module: ...

    def _merge(self, model: nn.Module) -> nn.Module:
        raise NotImplementedError

    @abstractmethod
    def _detach(self, model: nn.Module) -> nn.Module: ...

    def _forget(self, model: nn.Module) -> nn.Module:
        if _ATTRIBUTE in model.__dict__:
            delattr(model, _ATTRIBUTE)
        return model


def adapter_of(model: nn.Module) -> Adapter | None:
    """Which adapter a model has.

    Args:
        model: any model; a wrapper, not the model inside it.

    Returns:
        The adapter that was attached to ``model``; None where ``model`` has no adapter.
    """
    adapter: Adapter | None = model.__dict__.get(_ATTRIBUTE)
    return adapter


def released(model: nn.Module) -> nn.Module:
    """Merge a model's adapter, or detach an adapter that cannot be merged.

    Args:
        model: with or without an adapter; may be changed in place.

    Returns:
        The plain architecture; ``model`` itself where the model has no adapter.
    """
    adapter = adapter_of(model)
    if adapter is None:
        return model
    return adapter.merge(model) if adapter.merges else adapter.detach(model)


def transformer_of(model: nn.Module) -> Any:
    """Look inside the wrapper of a model's adapter.

    Args:
        model: with or without an adapter.

    Returns:
        The transformers model: ``model`` itself where there is no wrapper.
    """
    adapter = adapter_of(model)
    return model if adapter is None else adapter.transformer(model)


def prefix_of(model: nn.Module, rows: int) -> Tensor | None:
    """The learned prompt of a model's adapter, with a gradient.

    Args:
        model: with or without an adapter.
        rows: of the batch that the model reads next.

    Returns:
        The V vectors that the model reads before every row, shape (rows, V, E); None where there are none.
    """
    adapter = adapter_of(model)
    return None if adapter is None else adapter.prefix(model, rows)
