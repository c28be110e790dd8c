"""Methods that can tune another method's adapter instead of the model's weights.

    over = "fedit"                            the adapter with that method's defaults
    over = { name = "fedit", rank = 4 }       and with settings of that method
    left out                                  the model's own weights

Of the method named there is the adapter alone: its first values, what training changes, how it is merged. How clients
train, what travels and how it is averaged is the outer method's, over the adapter's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Generic

from torch import nn

from fedferret.algorithms.partly_private import PartlyPrivate
from fedferret.algorithms.registry import method
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, AnyAlgorithm, Client, Entry, Public, Server, Up
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.stages import Staged
from fedferret.settings import build, table_of

_SERVERS = {"server_optimizer"}  # settings of the server that an outer method may not have
_CHOOSE = "name a method that tunes an adapter, such as fedit or ssf"


@dataclass(frozen=True, kw_only=True)
class OverAdapter(Algorithm[Public, Server, Client, Entry, Up], Generic[Public, Server, Client, Entry, Up]):
    """Base of methods that tune the weights they are given, or an adapter's."""

    over: str | dict[str, Any] | None = None  # the method with the adapter, and its settings; None: the model's weights

    def __post_init__(self) -> None:
        if self.over is not None:  # in one form, so that equal settings are one run
            tuner = self._tuner
            assert tuner is not None
            spelt = {name: value for name, value in table_of(tuner).items() if name not in self._own | _SERVERS}
            object.__setattr__(self, "over", {"name": tuner.name, **spelt})

    @property
    def objectives(self) -> tuple[str, ...] | None:
        """The adapter's."""
        return self._tuner.objectives if self._tuner else None

    def check(self, model: nn.Module, rounds: int) -> None:
        """The adapter must be possible, and all of it shared."""
        if self._tuner:
            self._tuner.check(model, rounds)
            names = list(tree.parameters(model))
            if isinstance(self._tuner, PartlyPrivate) and self._tuner.shares(names) != names:
                raise UserError(_leaves_weights(self.name, self._tuner.name))

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with the adapter, as its method attaches it."""
        return self._tuner.prepare(model, key) if self._tuner else model

    def start_fingerprint(self, base: str) -> str:
        """The adapter's method's."""
        return self._tuner.start_fingerprint(base) if self._tuner else base

    def release(self, model: nn.Module) -> nn.Module:
        """Without the adapter, as its method takes it off."""
        return self._tuner.release(model) if self._tuner else model

    @property
    def _own(self) -> set[str]:
        """Settings that are this method's, whatever the method of the adapter calls so."""
        return {field.name for field in fields(self)}

    @cached_property
    def _tuner(self) -> AnyAlgorithm | None:
        """The method of the adapter."""
        if self.over is None:
            return None
        table = {"name": self.over} if isinstance(self.over, str) else dict(self.over)
        name = table.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f"over={self.over}: there is no name in it; {_CHOOSE}")
        kind = method(name)
        _refuse_unfit(self.name, name, kind)
        for setting in table:
            if setting in self._own:
                raise UserError(f"over.{setting}: clients and server do as {self.name} says; set algorithm.{setting}")
            if setting in _SERVERS:
                raise UserError(f"over.{setting}: the server does as {self.name} says; leave it out")
            if setting == "adapter":
                raise UserError(f"over.adapter: {self.name} begins from a new adapter; choose {name} to go on from one")
        tuner: AnyAlgorithm = build(kind, table, "over")
        return tuner


def _refuse_unfit(outer: str, name: str, kind: type[AnyAlgorithm]) -> None:
    """Refuse a method that has no adapter to give. Raises UserError."""
    if issubclass(kind, OverAdapter):
        raise UserError(f'over="{name}": {outer} is over an adapter, not over {name}; {_CHOOSE}')
    if issubclass(kind, Staged):
        raise UserError(f'over="{name}": {name} has several stages, and no one adapter; {_CHOOSE}')
    if kind.prepare is Algorithm.prepare:
        raise UserError(f'over="{name}": {name} tunes the model itself, as {outer} does without over; leave over out')
    if issubclass(kind, PartlyPrivate) and not (kind.shared is PartlyPrivate.shared and kind.has_global_model):
        raise UserError(_leaves_weights(outer, name))
    if kind.changes_base:
        raise UserError(f'over="{name}": {name} changes weights under its adapter, and {outer} does not; {_CHOOSE}')


def _leaves_weights(outer: str, name: str) -> str:
    return f'over="{name}": {name} leaves weights with each client, which {outer} alone decides; {_CHOOSE}'
