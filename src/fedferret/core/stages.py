"""Methods of several stages: each stage is a method, and the next begins from what the one before hands over.

    rounds 1 .. n_1                 stage 1
    hand over                       inside ``apply``: computed there by every node, or once by the server, and then the
                                    entry of the stage's last round (``core/hand_over.py``)
    rounds n_1 + 1 .. n_1 + n_2     stage 2, and so on

A staged method is an ordinary method; its fields are TOML. A stage's adapter is attached when the stage begins and
released when it ends. The public state holds the weights that the present stage stands on where they differ from the
checkpoint's, so a late client gets them like any other public state. Stages of zero rounds vanish: keys and round
numbers are as if they had never been named, and a method with one stage of any rounds is that stage alone, to the bit.
Costs, rounds and schedules are the stage's; a client keeps the private state of the present stage only.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Pooled, Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.hand_over import HandedOver, Stage, all_weights
from fedferret.core.keys import Key
from fedferret.core.messages import state
from fedferret.core.restore import restore_tensors
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree


@state
class StagedPublic:
    """The present stage, counted from 0, its public state, and what it stands on."""

    stage: int
    round: int  # finished rounds of this stage
    key: int  # seeds the stages to come
    weights: Tree  # frozen weights under this stage, by their plain names; empty where they are the checkpoint's
    figures: dict[str, float]  # of the hand-over to this stage, where it reports any
    public: Any


@state
class StagedServer:
    """The server's own state of a stage; one of an earlier stage is of no more use."""

    stage: int
    server: Any


@state
class StagedClient:
    """One client's private state of a stage."""

    stage: int
    client: Any


class Staged(Algorithm[StagedPublic, StagedServer, StagedClient, Any, Any]):
    """Base of methods of several stages; subclasses are frozen dataclasses that say what the stages are.

    See ``Algorithm`` for arguments and results; each function does the work of the present stage.
    """

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """What the method consists of.

        Returns:
            The stages in order; the caller leaves out those of zero rounds.
        """

    @property
    def objectives(self) -> tuple[str, ...] | None:
        """Those that every stage can take."""
        each = [stage.algorithm.objectives for stage in self.stages() if stage.rounds != 0]
        limits = [names for names in each if names is not None]
        return tuple(name for name in limits[0] if all(name in names for names in limits)) if limits else None

    def planned(self, rounds: int) -> tuple[tuple[Stage, int], ...]:
        """Divide the rounds of a run among the stages.

        Args:
            rounds: of the run.

        Returns:
            Each stage that has rounds with its number of rounds, in order; the numbers add up to ``rounds``.

        Raises:
            UserError: a negative number of rounds, no stage with any, or another sum than ``rounds``.
        """
        stages, left = [], rounds
        for number, stage in enumerate(self.stages(), start=1):
            given = left if stage.rounds is None else stage.rounds
            if given < 0:
                raise UserError(f"{self.name}: stage {number} has {given} rounds; give 0 (no such stage) or more")
            if given > left:
                raise UserError(
                    f"{self.name}: stages 1 to {number} have {rounds - left + given} rounds and the run has {rounds}; "
                    f"raise rounds or shorten a stage"
                )
            if given:
                stages.append((stage, given))
            left -= given
        if not stages:
            raise UserError(f"{self.name}: no stage has any round; give one of them rounds")
        if left:
            raise UserError(
                f"{self.name}: the stages have {rounds - left} rounds and the run has {rounds}; "
                f"set rounds={rounds - left} or lengthen a stage"
            )
        return tuple(stages)

    @property
    def pooling(self) -> Pooling:
        """The kind that all stages share; EACH, which no guard or robust pool takes, where they differ."""
        kinds = {stage.algorithm.pooling for stage in self.stages() if stage.rounds != 0}
        return kinds.pop() if len(kinds) == 1 else Pooling.EACH

    def pooling_at(self, public: StagedPublic) -> Pooling:
        """The present stage's."""
        return self._at(public).algorithm.pooling_at(public.public)

    def weighting_at(self, public: StagedPublic) -> Weighting:
        """The present stage's."""
        return self._at(public).algorithm.weighting_at(public.public)

    def check(self, model: nn.Module, rounds: int) -> None:
        """Every stage must be possible on the model that it is attached to."""
        for stage, given, prepared in self.prepared(model, rounds):
            stage.algorithm.check(prepared, given)

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The first stage's adapter alone."""
        return self._first().algorithm.prepare(model, key)

    def start_fingerprint(self, base: str) -> str:
        """Of what every stage begins from, in turn."""
        for stage in self.stages():
            base = stage.algorithm.start_fingerprint(base) if stage.rounds != 0 else base
        return base

    def release(self, model: nn.Module) -> nn.Module:
        """The plain architecture; only the present stage's adapter is attached, and peft's own record says which."""
        for stage in self.stages():
            model = stage.algorithm.release(model)
        return model

    def note(self, public: StagedPublic) -> str | None:
        """Which stage has begun, with the figures of the hand-over; the first stage is no news."""
        if not public.stage:
            return None
        figures = "".join(f", {name} {value:.4g}" for name, value in public.figures.items())
        return f"stage {public.stage + 1} of {self.name} begins: {self._at(public).algorithm.name}{figures}"

    def shapes(self, model: nn.Module, rounds: int) -> Callable[[int], Shapes]:
        """The shapes of the tensors that are tuned in each round.

        Args:
            model: prepared for the first stage, on the meta device.
            rounds: of the run.

        Returns:
            A function from a round's number, from 1, to shapes by parameter name.
        """
        by_stage = [
            (given, tree.shapes(tree.parameters(prepared))) for _, given, prepared in self.prepared(model, rounds)
        ]

        def of_round(round: int) -> Shapes:
            for given, shapes in by_stage:
                if round <= given:
                    return shapes
                round -= given
            return by_stage[-1][1]

        return of_round

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """The stage's of that round; ``shapes`` are those of that round too. A hand-over that is sent is the entry."""
        stage, number = self._in(round)
        cost = stage.algorithm.wire_cost(shapes, cohort, number)
        if stage.sent is None or number != stage.rounds:
            return cost
        down = 4.0 * stage.sent(shapes)
        return replace(cost, down_least=down, down_most=down)

    def sum_values(self, shapes: Shapes, round: int) -> int:
        """The stage's of that round."""
        stage, number = self._in(round)
        return stage.algorithm.sum_values(shapes, number)

    def update_norm(self, task: Task, public: StagedPublic, payload: Any) -> float | None:
        """The present stage's."""
        stage, task = self._enter(task, public)
        return stage.algorithm.update_norm(task, public.public, payload)

    def tuned(self, task: Task, public: StagedPublic) -> Mapping[str, Tensor]:
        """The present stage's."""
        stage, task = self._enter(task, public)
        return stage.algorithm.tuned(task, public.public)

    def init(self, task: Task, key: Key) -> tuple[StagedPublic, StagedServer]:
        """The first stage begins; the weights of the base are kept for the stages to come."""
        if task.replica.base is None and len(self.planned(task.rounds)) > 1:
            task.replica.base = task.store(self._plain_weights(task, 0))
        task.replica.stage = 0
        stage, first = self._stage(task, 0)
        public, server = stage.algorithm.init(first, key)
        return StagedPublic(0, 0, key.fold("stages").value, {}, {}, public), StagedServer(0, server)

    def init_client(self, task: Task, public: StagedPublic, data: Examples, key: Key) -> StagedClient | None:
        """The present stage's private state."""
        stage, task = self._enter(task, public)
        private = stage.algorithm.init_client(task, public.public, data, _staged(key, public.stage))
        return None if private is None else StagedClient(public.stage, private)

    def client_update(
        self, task: Task, public: StagedPublic, client: StagedClient | None, data: Examples, key: Key
    ) -> ClientReply[StagedClient, Any]:
        """The present stage's work."""
        stage, task = self._enter(task, public)
        private = client.client if client and client.stage == public.stage else None
        if private is None:
            private = stage.algorithm.init_client(task, public.public, data, _staged(key.fold("join"), public.stage))
        reply = stage.algorithm.client_update(task, public.public, private, data, key)
        kept = None if reply.client is None else StagedClient(public.stage, reply.client)
        return ClientReply(reply.payload, kept, reply.metrics)

    def personalise(
        self, task: Task, public: StagedPublic, client: StagedClient | None, training: Any, key: Key
    ) -> Any:
        """The present stage's."""
        stage, task = self._enter(task, public)
        private = client.client if client and client.stage == public.stage else None
        private = stage.algorithm.personalise(task, public.public, private, training, key)
        return None if private is None else StagedClient(public.stage, private)

    def accept(self, task: Task, public: StagedPublic, payload: Any) -> None:
        """The present stage's rule."""
        stage, task = self._enter(task, public)
        stage.algorithm.accept(task, public.public, payload)

    def accept_sum(self, task: Task, public: StagedPublic, sum: Any) -> None:
        """The present stage's rule."""
        stage, task = self._enter(task, public)
        stage.algorithm.accept_sum(task, public.public, sum)

    def server_update(
        self, task: Task, public: StagedPublic, server: StagedServer, pooled: Pooled[Any], key: Key
    ) -> tuple[StagedServer, Any]:
        """The present stage's step; a later stage's server state is made in the stage's first round."""
        stage, present = self._enter(task, public)
        own = server.server
        if server.stage != public.stage:
            with stage.algorithm.model(present, public.public):
                _, own = stage.algorithm.init(present, _staged(Key(public.key), public.stage))
        own, entry = stage.algorithm.server_update(present, public.public, own, pooled, key)
        if stage.sent is not None and self._hands_over(task, public):
            finished = restore_tensors(task, public.public)  # a copy
            stage.algorithm.apply(present, finished, entry)
            entry = self._computed(present, public, finished)
        return StagedServer(public.stage, own), entry

    def apply(self, task: Task, public: StagedPublic, entry: Any) -> None:
        """The present stage's entry; after the stage's last round, the hand-over."""
        stage, present = self._enter(task, public)
        last = self._hands_over(task, public)
        if isinstance(entry, HandedOver) != (last and stage.sent is not None):
            raise ValueError(f"a {type(entry).__name__} is no entry of this round of {self.name}")
        if isinstance(entry, HandedOver):
            self._hand_over(task, public, {**public.weights, **entry.weights}, entry.figures)
            return
        stage.algorithm.apply(present, public.public, entry)
        public.round += 1
        if last:
            handed = self._computed(present, public, public.public)
            self._hand_over(task, public, handed.weights, handed.figures)

    @contextmanager
    def model(self, task: Task, public: StagedPublic, client: StagedClient | None = None) -> Iterator[nn.Module | None]:
        """The present stage's model."""
        stage, task = self._enter(task, public)
        private = client.client if client and client.stage == public.stage else None
        with stage.algorithm.model(task, public.public, private) as model:
            yield model

    def _in(self, round: int) -> tuple[Stage, int]:
        """The stage of a round of the run, and that round's number in the stage."""
        for stage in self.stages():
            if stage.rounds is None or round <= stage.rounds:
                return stage, round
            round -= stage.rounds
        raise UserError(f"{self.name} has no stage in that round")

    def _first(self) -> Stage:
        return next((stage for stage in self.stages() if stage.rounds != 0), self.stages()[0])

    def _at(self, public: StagedPublic) -> Stage:
        return [stage for stage in self.stages() if stage.rounds != 0][public.stage]

    def prepared(self, model: nn.Module, rounds: int) -> Iterator[tuple[Stage, int, nn.Module]]:
        """Prepare every stage in turn.

        Args:
            model: prepared for the first stage, on the meta device; not changed.
            rounds: of the run.

        Returns:
            Each stage, its rounds and its model, which the next stage takes apart.
        """
        planned = self.planned(rounds)
        model = copy.deepcopy(model)
        for number, (stage, given) in enumerate(planned):
            if number:
                model = planned[number - 1][0].algorithm.release(model)
                model = stage.algorithm.prepare(_trainable(model), _staged(Key(0), number))
            yield stage, given, model

    def _stage(self, task: Task, number: int) -> tuple[Stage, Task]:
        """A stage, and the task with that stage's number of rounds, which its schedules are functions of."""
        stage, given = self.planned(task.rounds)[number]
        return stage, replace(task, rounds=given)

    def _enter(self, task: Task, public: StagedPublic) -> tuple[Stage, Task]:
        """The present stage, with its adapter attached and the weights that it stands on in the working model."""
        if task.replica.stage != public.stage:
            self._switch(task, public.stage, public.weights, Key(public.key))
        stage, own = self._stage(task, public.stage)
        return stage, replace(own, round=public.round + 1)

    def _switch(self, task: Task, number: int, weights: Mapping[str, Tensor], key: Key) -> None:
        """Release the replica's adapter and attach that of stage ``number``, over the base or ``weights``."""
        replica, planned = task.replica, self.planned(task.rounds)
        plain = planned[replica.stage][0].algorithm.release(replica.model)
        assert replica.base is not None
        for name, weight in all_weights(plain).items():
            weight.copy_(weights[name] if name in weights else replica.base[name])
        replica.model = planned[number][0].algorithm.prepare(_trainable(plain), _staged(key, number))
        replica.stage = number

    def _hands_over(self, task: Task, public: StagedPublic) -> bool:
        """Whether the round at hand is its stage's last, and a stage follows; ``task`` is the run's, not a stage's."""
        planned = self.planned(task.rounds)
        return public.round + 1 == planned[public.stage][1] and public.stage + 1 < len(planned)

    def _computed(self, present: Task, public: StagedPublic, finished: Any) -> HandedOver:
        """What the present stage leaves to the next, from the stage's public state after its last round."""
        stage, base = self._at(public), present.replica.base
        assert base is not None
        stood_on = {**dict(base.items()), **dict(public.weights.items())} if public.weights else base
        key = _staged(Key(public.key), public.stage + 1)
        handed = stage.hand_over(present, stood_on, stage.algorithm, finished, key.fold("hand-over"))
        return handed if isinstance(handed, HandedOver) else HandedOver(dict(handed), {})

    def _hand_over(
        self, task: Task, public: StagedPublic, weights: Mapping[str, Tensor], figures: Mapping[str, float]
    ) -> None:
        """Begin the next stage from plain weights and an adapter's first values."""
        number, replica = public.stage + 1, task.replica
        assert replica.base is not None
        plain = {name: weight for name, weight in weights.items() if name in replica.base}
        self._switch(task, number, plain, Key(public.key))
        for name, weight in all_weights(replica.model).items():  # an adapter's frozen parts too
            if name in weights and name not in plain:
                weight.copy_(weights[name])
        following, then = self._stage(task, number)
        public.public, _ = following.algorithm.init(then, _staged(Key(public.key), number))
        public.weights = task.store(plain) if plain else {}
        public.stage, public.round, public.figures = number, 0, dict(figures)

    def _plain_weights(self, task: Task, number: int) -> dict[str, Tensor]:
        """Every weight of the base, by its plain name, with the adapter of stage ``number`` left out."""
        plain = self.planned(task.rounds)[number][0].algorithm.release(copy.deepcopy(task.model))
        return all_weights(plain)


def _staged(key: Key, number: int) -> Key:
    """The key of a stage: the first stage's is the run's own, so that one stage alone has the bits of its method."""
    return key.fold("stage", number) if number else key


def _trainable(model: nn.Module) -> nn.Module:
    """``model`` as a checkpoint gives it: an adapter froze it, and the next stage may tune all of it."""
    return model.requires_grad_(True)
