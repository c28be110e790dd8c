"""The round loop: it knows no method, and no engine.

    for each round:  cohort <- sample          replies <- engine.map(job, cohort)
                     pooled <- pool in client order, whatever the order of arrival
                     server, entry <- update   log <- entry   public <- apply(entry)

Everything that differs between one process, many GPUs and many organisations sits behind ``Engine.map``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, Task
from fedferret.core.errors import TooFewClients
from fedferret.core.keys import Key
from fedferret.core.log import Log, Record
from fedferret.core.pooling import Pool, tensors


class Codec(Protocol):
    """How messages become bytes; ``len(encode(x))`` is their cost."""

    def encode(self, value: Any) -> bytes: ...
    def decode(self, data: bytes) -> Any: ...
    def size(self, value: Any) -> int: ...


@dataclass(frozen=True)
class Job:
    """What an engine needs for one round; it delivers ``log.since(...)`` or uses ``public`` where it is at hand."""

    algorithm: Algorithm[Any, Any, Any, Any, Any]
    task: Task
    public: Any
    log: Log
    round: int
    seed: int
    versions: Mapping[str, int] = field(default_factory=dict)  # as in RunState: what each client was last known to hold


def local_key(seed: int, round: int, client: str) -> Key:
    """The key of one client's work in a round."""
    return Key.of(seed, "local", round, client)


@dataclass(frozen=True)
class ClientUpdate:
    """A client's reply as it came off the wire."""

    client: str
    payload: Any
    weight: float
    metrics: Mapping[str, float]
    bytes_up: int


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, or whose answer was refused."""

    client: str
    stage: str  # "local", "wire", "pool", ...
    reason: str


class Engine(Protocol):
    """Where clients run."""

    def map(self, job: Job, cohort: Sequence[str]) -> Iterable[ClientUpdate | Failure]:
        """Let every client of the cohort work; outcomes may come in any order, one per client."""
        ...


@dataclass
class RunState:
    """All that a run is between two rounds."""

    public: Any
    server: Any
    log: Log
    round: int = 0
    versions: dict[str, int] = field(default_factory=dict)  # the log's version that each client holds; 0: the base


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round. Byte counts per client include catching up."""

    round: int
    cohort: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, float]]  # per client that answered
    failures: tuple[Failure, ...]
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    fingerprint: str
    seconds: float
    seconds_local: float  # spent in clients' training passes


@dataclass(frozen=True)
class Plan:
    """How rounds are run, whatever the method."""

    seed: int
    rounds: int
    per_round: int  # clients sampled
    min_clients: int = 1  # fewer answers than this end the run
    min_fraction: float = 0.0  # and so does a smaller share of those sampled
    max_weight: float = math.inf  # a client that claims more, in examples, is refused: it would outweigh all others
    fingerprint_every: int = 5  # rounds between hashes of the public state in the log; 0: only the last


def prepare(algorithm: Algorithm[Any, Any, Any, Any, Any], model: nn.Module, seed: int) -> nn.Module:
    """What the method tunes of the base ``model``: on every node of a run the same, to the bit."""
    return algorithm.prepare(model, Key.of(seed, "prepare"))


def initial_state(task: Task, algorithm: Algorithm[Any, Any, Any, Any, Any], seed: int, log: Log) -> RunState:
    """The state before round 1, from the weights that ``task.model`` holds."""
    public, server = algorithm.init(task, Key.of(seed, "begin"))
    return RunState(public, server, log)


def run(
    task: Task,
    algorithm: Algorithm[Any, Any, Any, Any, Any],
    engine: Engine,
    codec: Codec,
    clients: Sequence[str],
    state: RunState,
    plan: Plan,
    on_reply: Callable[[ClientUpdate | Failure], None] = lambda outcome: None,
) -> Iterator[RoundRecord]:
    """Play the rounds after ``state.round``, yielding a record after each; ``state`` is then up to date.

    Raises TooFewAnswers when fewer answered than the plan asks for; ``state`` is then as before that round.
    """
    for number in range(state.round + 1, plan.rounds + 1):
        started = time.perf_counter()
        cohort = Key.of(plan.seed, "cohort", number).sample(sorted(clients), plan.per_round)
        held = {client: state.versions.get(client, 0) for client in cohort}
        lacking = {version: state.log.since(version).size for version in set(held.values())}
        bytes_down = {client: lacking[version] for client, version in held.items()}
        job = Job(algorithm, task, state.public, state.log, number, plan.seed, dict(state.versions))
        pool, answers, failures = collect(job, engine.map(job, cohort), cohort, on_reply, plan.max_weight)
        needed = max(1, plan.min_clients, math.ceil(plan.min_fraction * len(cohort)))
        if len(pool) < needed:
            known = reasons(failures)
            raise TooFewClients(f"round {number}: {len(pool)} clients answered, {needed} are needed ({known})")
        server, entry = algorithm.server_update(
            task, state.public, state.server, pool.result(), Key.of(plan.seed, "update", number)
        )
        encoded = codec.encode(entry)
        algorithm.apply(task, state.public, codec.decode(encoded))  # the server applies what the clients will receive
        due = plan.fingerprint_every and number % plan.fingerprint_every == 0
        takes_fingerprint = due or number == plan.rounds
        fingerprint = tree.digest(tensors(state.public)) if takes_fingerprint else ""
        state.log.append(
            codec.encode(Record(number, encoded, fingerprint)),
            codec.size(state.public),
            lambda: codec.encode(state.public),
        )
        state.server, state.round = server, number
        state.versions.update({answer.client: number - 1 for answer in answers})  # they trained on the state before
        yield RoundRecord(
            number,
            tuple(cohort),
            {answer.client: answer.metrics for answer in answers},
            tuple(failures),
            {answer.client: answer.bytes_up for answer in answers},
            bytes_down,
            fingerprint,
            time.perf_counter() - started,
            sum(answer.metrics.get("seconds", 0.0) for answer in answers),
        )


def collect(
    job: Job,
    outcomes: Iterable[ClientUpdate | Failure],
    cohort: Sequence[str],
    on_reply: Callable[[ClientUpdate | Failure], None],
    max_weight: float = math.inf,
) -> tuple[Pool[Any], list[ClientUpdate], list[Failure]]:
    """Pool the answers in the cohort's order, holding back those that come early."""
    pool: Pool[Any] = Pool()
    answers: list[ClientUpdate] = []
    failures: list[Failure] = []
    for outcome in in_order(outcomes, cohort):
        if isinstance(outcome, ClientUpdate):
            try:
                if outcome.weight > max_weight:
                    raise ValueError(f"claims {outcome.weight:,.0f} examples, more than the {max_weight:,.0f} allowed")
                job.algorithm.accept(job.task, job.public, outcome.payload)
                pool.add(outcome.payload, outcome.weight)
                # the payload has been folded in; keeping it would cost a model per client
                answers.append(ClientUpdate(outcome.client, None, outcome.weight, outcome.metrics, outcome.bytes_up))
            except ValueError as error:
                outcome = Failure(outcome.client, "pool", str(error))
            except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as error:  # malformed
                outcome = Failure(outcome.client, "pool", f"{type(error).__name__}: {error}")
        if isinstance(outcome, Failure):
            failures.append(outcome)
        on_reply(outcome)
    return pool, answers, failures


def reasons(failures: Sequence[Failure], shown: int = 5) -> str:
    """Who failed and why, on one line; of many, the first."""
    told = [f"{failure.client}: {failure.reason}" for failure in failures[:shown]]
    return "; ".join([*told, *([f"and {len(failures) - shown} more"] if len(failures) > shown else [])])


def in_order(outcomes: Iterable[ClientUpdate | Failure], cohort: Sequence[str]) -> Iterator[ClientUpdate | Failure]:
    """Yield one outcome per client in the cohort's order, each as soon as those before it have come."""
    waiting: dict[str, ClientUpdate | Failure] = {}
    expected = iter(cohort)
    client = next(expected, None)
    for outcome in outcomes:
        waiting[outcome.client] = outcome
        while client in waiting:
            yield waiting.pop(client)
            client = next(expected, None)
    while client is not None:  # an engine that left one out must not take those after it along
        yield waiting.pop(client, Failure(client, "engine", "the engine gave no outcome for this client"))
        client = next(expected, None)
