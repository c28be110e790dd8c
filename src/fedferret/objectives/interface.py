"""What an objective says beside its loss: the models and the examples it takes, and how a tuned model is handed over.

    [objective] of a recipe  ->  check, without weights  ->  model  ->  examples as tensors  ->  loss, sums  ->  figures

An objective is a frozen dataclass; its fields are its settings. ``docs/adding-an-objective.md`` adds one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.task import Examples
from fedferret.data.examples import Example, FederatedData
from fedferret.data.text import TextSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Sequence[Example], bool], Examples]  # the bool: for training


class Loaded(Protocol):
    """A base model with what belongs to it."""

    @property
    def name(self) -> str:
        """As the recipe has it."""
        ...

    @property
    def model(self) -> Any:
        """The module, on its device, in evaluation mode."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Of a model that reads text."""
        ...


class ModelObjective(ABC):
    """An objective, and the models and data that it takes."""

    name: ClassVar[str]
    primary: ClassVar[str] = "loss"  # the figure by which clients are compared
    higher_is_better: ClassVar[bool] = False  # of the primary figure
    scores_clients: ClassVar[bool] = False  # whether [evaluation] per_client is on unless a recipe says otherwise
    generates: ClassVar[bool] = False  # whether answers can be generated, for metrics beside the figures

    @property
    @abstractmethod
    def sums(self) -> Mapping[str, float]:
        """The sums that ``scores`` gives beside ``count``: by name, the most that one target adds, either side of 0."""

    def check_sums(self, sums: Mapping[str, float]) -> None:
        """See ``core.task.Objective``: here a loss below 0 is refused."""
        if sums["loss"] < 0:
            raise ValueError(f"the sum 'loss' is {sums['loss']:g}: must not be negative")

    @abstractmethod
    def by_example(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss of each example apart.

        Args:
            model: what ``load`` gave, with or without an adapter.
            batch: from ``Examples.batches``, B examples.

        Returns:
            For each example the sum over its targets, float64, shape (B,), with a gradient; and the number of its
            targets, int64, shape (B,).
        """

    @abstractmethod
    def scores(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """See ``core.task.Objective``."""

    @abstractmethod
    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """See ``core.task.Objective``."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """See ``core.task.Objective``: here the mean over all targets of the batch."""
        losses, counts = self.by_example(model, batch)
        return (losses.sum() / counts.sum()).float()

    @abstractmethod
    def check_model(self, model: str) -> None:
        """Refuse a model that cannot be, without reading weights. Raises UserError."""

    def text_settings(self, model: str) -> frozenset[str]:
        """Name the settings of [text] that have an effect; others are refused.

        Args:
            model: its name.
        """
        return frozenset({"max_tokens"})

    def check(self, model: str, text: TextSettings) -> None:
        """Refuse a model or text settings that cannot be, or have no effect, without reading weights.

        Args:
            model: its name.
            text: how examples become tokens.

        Raises:
            UserError: with one line.
        """
        self.check_model(model)
        read = self.text_settings(model)
        for setting in fields(text):
            value = getattr(text, setting.name)
            if setting.name not in read and value != setting.default:
                raise UserError(
                    f'text.{setting.name}={value!r}: objective "{self.name}" on model "{model}" reads no such setting; '
                    f"leave it out"
                )

    def check_tuned(self, name: str, model: nn.Module, text: TextSettings, longest: int) -> None:
        """Refuse what cannot be read by the model that is tuned, without weights.

        Args:
            name: the model's.
            model: on the meta device, with the method's adapter if it has one.
            text: how examples become tokens.
            longest: tokens of a training batch, at most.

        Raises:
            UserError: with one line.
        """
        return

    def check_loaded(self, loaded: Loaded, model: nn.Module, text: TextSettings) -> None:
        """Refuse a model that would be trained wrongly, by trying it on a few tokens.

        Args:
            loaded: the base.
            model: that is tuned: the base, with the method's adapter if it has one.
            text: how examples become tokens.

        Raises:
            UserError: with one line.
        """
        return

    def reads_every_token(self, loaded: Loaded) -> bool:
        """Look whether the model has an embedding for every token that its tokenizer may give.

        Args:
            loaded: the model and its tokenizer.

        Returns:
            False where only the data can tell.
        """
        return True

    def resolved(self, model: str) -> ModelObjective:
        """The objective with what it takes from the model spelt out, so that a copy under another name is the same.

        Args:
            model: its name.
        """
        return self

    @abstractmethod
    def check_examples(self, model: str, data: FederatedData, complete: bool = True) -> None:
        """Refuse data that cannot be trained or scored on, without reading weights.

        Args:
            model: the model's name.
            data: of the clients here, and the global held-out sets.
            complete: whether these are all clients; a site sees its own alone.

        Raises:
            UserError: with one line.
        """

    @abstractmethod
    def skeleton(self, model: str) -> nn.Module:
        """What ``load`` gives, on the meta device: modules and shapes, no values."""

    @abstractmethod
    def load(self, model: str, device: str, log: Callable[[str], None]) -> Loaded:
        """The base model in fp32, on the device, in evaluation mode."""

    @abstractmethod
    def encoder(self, loaded: Loaded, text: TextSettings) -> Encode:
        """A function from examples to what ``Examples.batches`` reads, in the same order."""

    def check_template(self, model: str, text: TextSettings, data: FederatedData) -> None:
        """Refuse a template that the data need and the model has not, without reading weights.

        Args:
            model: its name.
            text: how examples become tokens.
            data: of the run.

        Raises:
            UserError: with one line.
        """
        return

    def check_encoding(self, loaded: Loaded, text: TextSettings, data: FederatedData) -> tuple[str, ...]:
        """Refuse examples that cannot become tensors, before work.

        Args:
            loaded: the base model.
            text: how examples become tokens.
            data: of the run; at a site, the site's own.

        Returns:
            Lines for the user on what becomes of the examples.

        Raises:
            UserError: with one line.
        """
        return ()

    @abstractmethod
    def save(self, loaded: Loaded, folder: Path, max_tokens: int | None = None) -> str:
        """Write a tuned model, without an adapter, as a folder.

        Args:
            loaded: with the tuned model.
            folder: absent or empty.
            max_tokens: of a text in training; None where that is not known.

        Returns:
            One line on how to load the folder.
        """

    def freeze(self, model: nn.Module) -> None:
        """Leave only the head to be trained. Raises UserError where there is none."""
        raise UserError(
            f'model.train="head": the objective {self.name} has no head that can be trained alone; leave train out'
        )
