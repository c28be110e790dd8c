"""The round loop: it knows no method, and no engine.

    for each round:   cohort <- sample
                      the exchanges of the run's guards, Train among them; without a guard, Train alone
                      accept, weight and pool the updates in client order, whatever the order of arrival
                      server, entry <- server_update     log <- entry     public <- apply(entry)
                      save (the caller's checkpoint), then commit (the clients' private states)

``score`` runs after a commit. Whatever differs between one process, many GPUs and many organisations is behind
``Engine``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedferret.core import tree
from fedferret.core.clients import ClientChanges
from fedferret.core.errors import RunError, TooFewClients
from fedferret.core.exchanges import Body, ClientScores, Failure, Reply, Score, Train, bodies_of
from fedferret.core.guard import TRAIN, Exchange, exchanges_after, exchanges_before
from fedferret.core.intake import Intake
from fedferret.core.keys import Key
from fedferret.core.log import Log, Record
from fedferret.core.messages import framing_bytes
from fedferret.core.metrics import check_sums
from fedferret.core.node import Node
from fedferret.core.norms import FINITE, LARGEST, check_values
from fedferret.core.robust_pooling import PoolSettings
from fedferret.core.task import Objective
from fedferret.core.weighting import Bounds


@dataclass
class RunState:
    """All that a run is between two rounds.

    Attributes:
        node: the server's node: model, method and public state.
        server: the server's own state.
        log: the entries.
        round: the last finished round.
        versions: the log's version before the last round in which each client was counted; 0 is the base.
        held: the log's version that each client scored its model at last; see ``holds``.
        rewinds: round and epoch of each rewinding; None: not known.
        changes: to the list of clients, since the run began.
    """

    node: Node
    server: Any
    log: Log
    round: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    changes: ClientChanges = field(default_factory=ClientChanges)
    held: dict[str, int] = field(default_factory=dict)
    rewinds: Sequence[tuple[int, int]] | None = None

    def counted(self, client: str) -> tuple[int, int]:
        """The last round in which a client was counted.

        Args:
            client: its name.

        Returns:
            The round, 0 before the first, and the epoch in which it was run; -1: not known.
        """
        round = self.versions[client] + 1 if client in self.versions else 0
        if self.rewinds is None:
            return round, -1
        return round, max((epoch for to, epoch in self.rewinds if to < round), default=0)  # epochs only rise

    def holds(self, client: str) -> int | None:
        """The log's version that a client is known to hold, by training or by scoring.

        Args:
            client: its name.

        Returns:
            0 is the base; None: it never replied.
        """
        return max((books[client] for books in (self.versions, self.held) if client in books), default=None)

    @property
    def public(self) -> Any:
        """The public state."""
        return self.node.public


class Engine(Protocol):
    """Where clients run."""

    def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterable[Reply | Failure]:
        """Let every client handle a body.

        Args:
            bodies: by client. Bodies differ where a guard's shares and masks do.
            state: of the run, before the round; not changed.

        Returns:
            One outcome per client, in any order.
        """
        ...

    def commit(self, round: int, refused: Sequence[str]) -> None:
        """Keep the clients' new private states, now that the round is saved.

        Args:
            round: number of the saved round.
            refused: clients with a failure in this round; they keep the private states from before it.
        """
        ...

    def close(self) -> None:
        """End whatever the engine started."""
        ...


@dataclass(frozen=True)
class Plan:
    """How rounds are run, whatever the method."""

    seed: int
    rounds: int
    per_round: int  # clients sampled
    min_clients: int = 1  # fewer client updates than this end the run
    min_fraction: float = 0.0  # and so does a smaller share of those sampled
    bounds: Bounds | None = None  # on the weight that a claim of examples gives; None: claims are trusted
    pool: PoolSettings = field(default_factory=PoolSettings)
    deadline: float = 3600.0  # seconds of an exchange, where the engine has a deadline
    fingerprint_every: int = 5  # rounds between hashes of the public state in the log; 0: only the last


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round. Byte counts per client include catching up, and do not depend on scoring."""

    round: int
    cohort: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, float]]  # per client with an update
    failures: tuple[Failure, ...]
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    fingerprint: str
    seconds: float  # until the entry was applied; saving comes on top
    seconds_local: float  # spent in clients' training passes
    bounded: tuple[str, ...] = ()  # clients with a claim of examples that counted for less than it said
    seconds_saving: float = 0.0  # spent in writing events, checkpoint and clients' states
    brought: Mapping[str, int] = field(default_factory=dict)  # of ``bytes_down``, what scoring had brought already


def run(
    engine: Engine,
    clients: Sequence[str] | Callable[[int], Sequence[str]],
    state: RunState,
    plan: Plan,
    on_outcome: Callable[[Reply | Failure], None] = lambda outcome: None,
    save: Callable[[RoundRecord], None] = lambda record: None,
) -> Iterator[RoundRecord]:
    """Run the rounds after ``state.round``.

    Args:
        engine: where clients run.
        clients: all who may be sampled; where that changes, a function from a round's number, called as it begins.
        state: changed in place.
        plan: how rounds are run.
        on_outcome: called with every reply and failure of every exchange, in client order, once the reply is read.
        save: called with the record before the engine commits; a round that it does not finish is run again.

    Yields:
        One record per round, after the engine has committed it; ``state`` is then up to date.

    Raises:
        TooFewClients: fewer updates came than the plan asks for; ``state`` is as before that round.
    """
    for number in range(state.round + 1, plan.rounds + 1):
        sampled = clients(number) if callable(clients) else clients
        record = _round(engine, sampled, state, plan, number, on_outcome)
        started = time.perf_counter()
        save(record)
        engine.commit(number, [failure.client for failure in record.failures])
        yield replace(record, seconds_saving=time.perf_counter() - started)


def score(
    engine: Engine, clients: Sequence[str], state: RunState, batch_size: int, trusted: bool = False
) -> tuple[dict[str, dict[str, float]], list[Failure], dict[str, int]]:
    """Score clients' models on what the clients hold out, after the last committed round; no round depends on it.

    Args:
        engine: where clients run.
        clients: whom to ask.
        state: of the run; ``held`` is brought up to date.
        batch_size: examples scored at once.
        trusted: whether clients are simulated here: what is not finite then shows in the figures.

    Returns:
        The sums of each client that scored, the failures, and bytes per client, both ways.
    """
    bodies = bodies_of(Score(state.round, batch_size), list(clients))
    missing = _missing_bytes(state, {client: state.holds(client) or 0 for client in clients})
    sums: dict[str, dict[str, float]] = {}
    failures: list[Failure] = []
    moved: dict[str, int] = {}
    for outcome in in_order(engine.exchange(bodies, state), clients):
        outcome = _scored(outcome, state.node.task.objective, trusted)
        if isinstance(outcome, Failure):
            failures.append(outcome)
        else:
            sums[outcome.client] = dict(outcome.body.sums)
            moved[outcome.client] = outcome.bytes_up + missing[outcome.client]
            state.held[outcome.client] = state.log.version  # what it was sent to score, it is not sent again to train
    return sums, failures, moved


def _scored(outcome: Reply | Failure, objective: Objective, trusted: bool) -> Reply | Failure:
    """A reply with sums that can be, or the failure that it is."""
    if isinstance(outcome, Failure):
        return outcome
    if not isinstance(outcome.body, ClientScores):
        return Failure(outcome.client, "score", f"sent a {type(outcome.body).__name__} for its scores")
    if trusted:
        return outcome
    try:
        check_sums(outcome.body.sums, objective.sums)
        objective.check_sums(outcome.body.sums)
    except ValueError as error:
        return Failure(outcome.client, "score", str(error))
    return outcome


def _round(
    engine: Engine,
    clients: Sequence[str],
    state: RunState,
    plan: Plan,
    number: int,
    on_outcome: Callable[[Reply | Failure], None],
) -> RoundRecord:
    started = time.perf_counter()
    node = state.node
    task, algorithm, codec = node.task, node.algorithm, node.codec
    cohort = Key.of(plan.seed, "cohort", number).sample(sorted(clients), plan.per_round)
    bytes_down = _missing_bytes(state, {client: state.versions.get(client, 0) for client in cohort})
    sent = _missing_bytes(state, {client: state.holds(client) or 0 for client in cohort})
    intake = Intake(node, plan, longest_update(node, len(cohort), number), len(cohort))
    alive, received = list(cohort), {}
    exchanged: dict[str, int] = {}

    def ask(exchange: Exchange, bodies: Mapping[str, Body]) -> list[str]:
        """One exchange with a guard's bodies; returns who replied."""
        replies: dict[str, Any] = {}
        for outcome in in_order(engine.exchange(bodies, state), list(bodies)):
            if isinstance(outcome, Reply) and type(outcome.body) is not exchange.reply_type:
                wrong = f"sent a {type(outcome.body).__name__} where a {exchange.reply_type.__name__} was expected"
                outcome = Failure(outcome.client, exchange.name, wrong)
            if isinstance(outcome, Reply):
                replies[outcome.client] = outcome.body
                moved = outcome.bytes_up + codec.size(bodies[outcome.client])
                exchanged[outcome.client] = exchanged.get(outcome.client, 0) + moved
            else:
                intake.failures.append(outcome)
            on_outcome(outcome)
        received[exchange.name] = replies
        return list(replies)

    for exchange in exchanges_before(node.guards):
        alive = ask(exchange, exchange.bodies(number, alive, received))
    for outcome in in_order(engine.exchange(bodies_of(Train(number), alive), state), alive):
        on_outcome(intake.take(outcome))
    for failure in intake.refuse_outliers():
        on_outcome(failure)
    received[TRAIN] = dict.fromkeys(intake.accepted)
    answered = intake.clients
    for exchange in exchanges_after(node.guards):
        ask(exchange, exchange.bodies(number, answered, received))
    needed = max(1, plan.min_clients, math.ceil(plan.min_fraction * len(cohort)))
    if len(answered) < needed:
        known = reasons(intake.failures)
        hint = "; a lower learning rate gives shorter updates" if "pool.norm_" in known else ""
        raise TooFewClients(f"round {number}: {len(answered)} clients replied, {needed} are needed ({known}){hint}")
    pooled = intake.result()
    for guard in reversed(node.guards):
        pooled = guard.on_server(pooled, answered, received)
    if node.guards:
        for pooled_sum in pooled.sums:
            algorithm.accept_sum(task, node.public, pooled_sum)
            _check(pooled_sum, LARGEST * len(answered), f"round {number}: the sum of {', '.join(answered)}")
    pooled = replace(pooled, clients=tuple(answered))
    server, entry = algorithm.server_update(
        task, node.public, state.server, pooled, Key.of(plan.seed, "update", number)
    )
    encoded = codec.encode(entry)
    _apply(node, codec.decode(encoded), f"round {number} of {', '.join(answered)}")  # what clients will receive
    due = plan.fingerprint_every and number % plan.fingerprint_every == 0
    fingerprint = node.fingerprint() if due or number == plan.rounds else ""
    record = codec.encode(Record(number, encoded, fingerprint))
    state.log.append(record, codec.size(node.public), lambda: codec.encode(node.public))
    state.server, state.round = server, number
    state.versions.update(dict.fromkeys(answered, number - 1))  # they trained on the state before
    return RoundRecord(
        number,
        tuple(cohort),
        {client: update.metrics for client, update in intake.accepted.items()},
        tuple(intake.failures),
        {client: update.bytes_up + exchanged.get(client, 0) for client, update in intake.accepted.items()},
        bytes_down,
        fingerprint,
        time.perf_counter() - started,
        sum(update.metrics.get("seconds", 0.0) for update in intake.accepted.values()),
        intake.bounded(),
        brought={client: count - sent[client] for client, count in bytes_down.items() if count != sent[client]},
    )


def _apply(node: Node, entry: Any, origin: str) -> None:
    """Apply an entry of finite values, and see that the state is finite; raises RunError, which names ``origin``.

    No client can cause this: its update was bounded before it was pooled. A method or its settings can.
    """
    _check(entry, FINITE, f"the entry of {origin}")
    node.apply(entry)
    try:
        _check(node.public, FINITE, f"the public state after {origin}")
    except RunError:
        node.void = True  # the round is not in the log: the next start rebuilds the state before the round
        raise


def _check(value: Any, most: float, what: str) -> None:
    try:
        check_values(value, most)
    except ValueError as error:
        raise RunError(f"{what} is not kept: {error}; lower the method's learning rates") from None


def _missing_bytes(state: RunState, held: Mapping[str, int]) -> dict[str, int]:
    """The bytes of the log after the version that each client holds; the log is read once per version."""
    sizes = {version: state.log.since(version).size for version in set(held.values())}
    return {client: sizes[version] for client, version in held.items()}


def longest_update(node: Node, cohort: int, round: int) -> float:
    """Bytes that a client's update may have: by the method's formula; masked sums have eight a value.

    Args:
        node: of the round's stage.
        cohort: clients in the round.
        round: from 1.

    Returns:
        The most bytes of an encoded ``ClientUpdate``.
    """
    shapes = tree.shapes(tree.parameters(node.task.model))
    if any(guard.modulus is not None for guard in node.guards):
        return 8 * node.algorithm.sum_values(shapes, round) + framing_bytes(shapes)
    return node.algorithm.wire_cost(shapes, cohort, round).up_most + framing_bytes(shapes)


def reasons(failures: Sequence[Failure], shown: int = 5) -> str:
    """Who failed and why, on one line.

    Args:
        failures: in the order in which they are named.
        shown: the most failures to name.

    Returns:
        Names with reasons, separated by semicolons, and the number of failures left out; "" without failures.
    """
    named = [f"{failure.client}: {failure.reason}" for failure in failures[:shown]]
    return "; ".join([*named, *([f"and {len(failures) - shown} more"] if len(failures) > shown else [])])


def in_order(outcomes: Iterable[Reply | Failure], clients: Sequence[str]) -> Iterator[Reply | Failure]:
    """Sort outcomes into the order of ``clients`` while they come.

    Args:
        outcomes: at most one per client, in any order.
        clients: names in the order wanted, each once.

    Yields:
        One outcome per client, as soon as those before it have come; a failure for a client that has none.
    """
    waiting: dict[str, Reply | Failure] = {}
    expected = iter(clients)
    client = next(expected, None)
    for outcome in outcomes:
        waiting[outcome.client] = outcome
        while client in waiting:
            yield waiting.pop(client)
            client = next(expected, None)
    while client is not None:  # an engine that left one out must not take those after it along
        yield waiting.pop(client, Failure(client, "engine", "the engine gave no outcome for this client"))
        client = next(expected, None)
