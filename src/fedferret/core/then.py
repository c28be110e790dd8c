"""Composition: one method for the first rounds, another for the rest.

    then(first, second, after=n):   rounds 1..n play ``first``; its tuned model is handed over, in the open,
                                    as the weights that ``second`` begins from; rounds n+1.. play ``second``

The hand-over happens inside ``apply``, on every node alike, from public facts only, so it costs no bytes.
Clients keep one private state per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import nn

from fedferret.core.algorithm import Algorithm, ClientReply, Examples, Pooled, Task, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import state


@state
class ThenPublic:
    """``first`` until the hand-over, ``second`` afterwards; ``key`` seeds the second's beginning."""

    round: int
    key: int
    first: Any
    second: Any


@state
class ThenServer:
    """The server's memory of each stage."""

    first: Any
    second: Any


@state
class ThenClient:
    """One client's memory of each stage."""

    first: Any
    second: Any


HandOver = Callable[[Task, nn.Module], None]


def nothing(task: Task, model: nn.Module) -> None:
    """Hand over the first stage's model as it is."""


@dataclass(frozen=True, kw_only=True)
class Then(Algorithm[ThenPublic, ThenServer, ThenClient, Any, Any]):
    """Two methods, one after the other. Built by :func:`then`."""

    name: ClassVar[str] = "then"
    first: Algorithm[Any, Any, Any, Any, Any]
    second: Algorithm[Any, Any, Any, Any, Any]
    after: int
    hand_over: HandOver = nothing  # may change the model in place, or keep facts about it, between the stages

    def check(self, shapes: Mapping[str, tuple[int, ...]], rounds: int) -> None:
        """Both stages must be possible, and the second must get at least one round."""
        if not 0 < self.after < rounds:
            raise UserError(f"after={self.after}: must lie between 1 and rounds - 1 = {rounds - 1}")
        self.first.check(shapes, self.after)
        self.second.check(shapes, rounds - self.after)

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """Both stages tune one model: an adapter that either of them needs is there for both."""
        return self.second.prepare(self.first.prepare(model, key.fold("first")), key.fold("second"))

    def wire_cost(self, shapes: Mapping[str, tuple[int, ...]], cohort: int) -> WireCost:
        """The dearer stage's."""
        stages = [stage.wire_cost(shapes, cohort) for stage in (self.first, self.second)]
        return WireCost(*(max(getattr(stage, cost.name) for stage in stages) for cost in fields(WireCost)))

    def accept(self, task: Task, public: ThenPublic, payload: Any) -> None:
        """The current stage's rule."""
        if public.second is None:
            self.first.accept(task, public.first, payload)
        else:
            self.second.accept(task, public.second, payload)

    def init(self, task: Task, key: Key) -> tuple[ThenPublic, ThenServer]:
        """Only the first stage begins; the second's key is drawn now so that every node has it."""
        public, server = self.first.init(task, key)
        return ThenPublic(0, key.fold("second").value, public, None), ThenServer(server, None)

    def init_client(self, task: Task, data: Examples, key: Key) -> ThenClient:
        """The second stage's private state is born in that stage, for late comers too."""
        return ThenClient(self.first.init_client(task, data, key), None)

    def client_update(
        self, task: Task, public: ThenPublic, client: ThenClient | None, data: Examples, key: Key
    ) -> ClientReply[ThenClient, Any]:
        """The current stage's work; the other stage's private state is carried along."""
        client, task = client or ThenClient(None, None), self._stage(task, public)
        if public.second is None:
            reply = self.first.client_update(task, public.first, client.first, data, key)
            return ClientReply(reply.payload, reply.weight, ThenClient(reply.client, client.second), reply.metrics)
        private = client.second
        if private is None:
            private = self.second.init_client(task, data, key.fold("join"))
        reply = self.second.client_update(task, public.second, private, data, key)
        return ClientReply(reply.payload, reply.weight, ThenClient(client.first, reply.client), reply.metrics)

    def server_update(
        self, task: Task, public: ThenPublic, server: ThenServer, pooled: Pooled[Any], key: Key
    ) -> tuple[ThenServer, Any]:
        """The current stage's step; the second's server state is born in its first round."""
        task = self._stage(task, public)
        if public.second is None:
            first, entry = self.first.server_update(task, public.first, server.first, pooled, key)
            return ThenServer(first, None), entry
        second = server.second
        if second is None:
            with self.second.model(task, public.second):
                _, second = self.second.init(task, Key(public.key))
        second, entry = self.second.server_update(task, public.second, second, pooled, key)
        return ThenServer(server.first, second), entry

    def apply(self, task: Task, public: ThenPublic, entry: Any) -> None:
        """The current stage's entry; after round ``after``, the hand-over."""
        public.round += 1
        if public.second is not None:
            self.second.apply(task, public.second, entry)
            return
        self.first.apply(task, public.first, entry)
        if public.round == self.after:
            with self.first.model(task, public.first) as model:
                if model is None:
                    raise UserError(f"{self.first.name} has no global model to hand over to {self.second.name}")
                self.hand_over(task, model)
                public.second, _ = self.second.init(task, Key(public.key))
            public.first = None

    def _stage(self, task: Task, public: ThenPublic) -> Task:
        """The task with the current stage's number of rounds, which is what a stage's schedule is a function of."""
        return replace(task, rounds=self.after if public.second is None else task.rounds - self.after)

    @contextmanager
    def model(self, task: Task, public: ThenPublic, client: ThenClient | None = None) -> Iterator[nn.Module | None]:
        """The current stage's model."""
        if public.second is None:
            with self.first.model(task, public.first, client and client.first) as model:
                yield model
        else:
            with self.second.model(task, public.second, client and client.second) as model:
                yield model


def then(
    first: Algorithm[Any, Any, Any, Any, Any],
    second: Algorithm[Any, Any, Any, Any, Any],
    *,
    after: int,
    hand_over: HandOver = nothing,
) -> Then:
    """Play ``first`` for ``after`` rounds, then ``second``, which begins from the model that the first leaves."""
    return Then(first=first, second=second, after=after, hand_over=hand_over)
