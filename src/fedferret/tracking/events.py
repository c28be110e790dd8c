"""The diary of a run: ``events.jsonl``, one JSON object a line, written as things happen.

    {"event": "round", "time": "2026-11-22T19:02:11+00:00", "round": 3, "clients": ["a", "b"], ...}

Lines are only ever added, each flushed to disk as a whole. A crash can tear the last one: readers skip it, and
the next writer cuts it off and says so. A resumed run plays the rounds after its checkpoint again, so the last
event of a kind and round holds, and ``resume`` at round r takes back whatever was said of later rounds.
A number that is NaN or infinite is written as ``null`` (JSON has neither) and read as NaN.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError
from fedferret.core.rounds import Failure, RoundRecord
from fedferret.wire.ledger import Ledger

FILE = "events.jsonl"
Event = dict[str, Any]


class EventLog:
    """Appends to the diary of the run in ``folder``; opening it again goes on where the last whole line ends."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        _cut_torn_line(self._path)

    def write(self, kind: str, /, **fields: Any) -> None:
        """Add one event. ``fields`` are what JSON can hold; when the call returns, the line is on disk."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = {"event": kind, "time": now, **_finite(fields)}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def read_events(folder: Path) -> list[Event]:
    """All whole lines of the diary, oldest first. Raises UserError where there is none or a line is damaged."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {FILE}; give the folder that `fedferret run` wrote")
    return list(_parse(path))


@dataclass(frozen=True)
class Evaluation:
    """Scores of the model after ``round`` (0: before tuning), by held-out set; the first set is the main one."""

    round: int
    results: Mapping[str, Mapping[str, float]]  # name: loss (nats a token), perplexity, tokens, ...
    seconds: float
    who: str  # "global": the server's model; anything else says whose
    per_client: Mapping[str, float] = field(default_factory=dict)  # the loss of each owner of the main set's examples

    @property
    def loss(self) -> float:
        """The main held-out set's loss."""
        return next(iter(self.results.values()))["loss"]

    @property
    def perplexity(self) -> float:
        """The main held-out set's perplexity."""
        return next(iter(self.results.values()))["perplexity"]


@dataclass(frozen=True)
class Baseline:
    """What tuning is compared with: a mean loss on the main held-out set, and one per client where it has them."""

    name: str
    loss: float
    per_client: Mapping[str, float]


@dataclass(frozen=True)
class Round:
    """What happened in a round, as the diary has it. Seconds are wall-clock, bytes include catching up."""

    round: int
    clients: tuple[str, ...]  # sampled, in the cohort's order
    failures: tuple[Failure, ...]
    loss: float  # mean training loss over the clients that answered
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    seconds: float
    seconds_local: float
    seconds_overhead: float
    fingerprint: str


@dataclass
class Run:
    """A run as its diary tells it, finished or not."""

    start: Event = field(default_factory=dict)
    rounds: dict[int, Round] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    baselines: dict[str, Baseline] = field(default_factory=dict)
    status: str = "in progress"  # "finished", "interrupted"
    last: str = ""  # ISO time of the last event

    @property
    def done(self) -> int:
        """The last round that was played; 0 before the first."""
        return max(self.rounds, default=0)

    @property
    def planned(self) -> int:
        """Rounds that the recipe asks for."""
        return int(self.start.get("rounds", self.done))

    @property
    def failures(self) -> list[tuple[int, Failure]]:
        """Every failure with its round."""
        return [(number, failure) for number in sorted(self.rounds) for failure in self.rounds[number].failures]

    def ledger(self) -> Ledger:
        """The bytes of all rounds."""
        ledger = Ledger(int(self.start.get("parameters", 0)))
        for number, entry in sorted(self.rounds.items()):
            ledger.add(number, entry.bytes_up, entry.bytes_down)
        return ledger


def read(folder: Path) -> Run:
    """The run in ``folder``. Raises UserError where there is none or its diary is damaged."""
    return replay(read_events(folder))


def replay(events: Iterable[Event]) -> Run:
    """Tell the run from its events: the last event of a kind and round holds."""
    run = Run()
    for event in events:
        match event["event"]:
            case "start":
                run = Run(start=event)
            case "resume":
                run.rounds = {n: entry for n, entry in run.rounds.items() if n <= event["round"]}
                run.evaluations = {n: entry for n, entry in run.evaluations.items() if n <= event["round"]}
                run.status = "in progress"
            case "round":
                run.rounds[event["round"]] = _round(event)
            case "evaluation":
                results = {name: _numbers(scores) for name, scores in event["results"].items()}
                losses = _numbers(event.get("per_client", {}))
                evaluation = Evaluation(event["round"], results, event["seconds"], event.get("who", "global"), losses)
                run.evaluations[event["round"]] = evaluation
            case "baseline":
                per_client = _numbers(event.get("per_client", {}))
                run.baselines[event["name"]] = Baseline(event["name"], _number(event["loss"]), per_client)
            case "end":
                run.status = "finished"
            case "interrupted":
                run.status = "interrupted"
        run.last = event["time"]
    return run


def beside_loss(scores: Mapping[str, float]) -> dict[str, float]:
    """A held-out set's figures without those that every set has: loss, perplexity and the number of tokens."""
    return {name: value for name, value in scores.items() if name not in ("loss", "perplexity", "tokens")}


def headline(scores: Mapping[str, float]) -> dict[str, float]:
    """Of those, what is said first: of the owners' losses, the worst."""
    hidden = ("client-mean", "deviation", "range")
    return {name: value for name, value in beside_loss(scores).items() if name not in hidden}


def round_fields(record: RoundRecord) -> dict[str, Any]:
    """The fields of a ``round`` event, from what the round loop yields."""
    losses = [metrics["loss"] for metrics in record.metrics.values() if "loss" in metrics]
    return {
        "round": record.round,
        "clients": list(record.cohort),
        "failures": [{"client": f.client, "stage": f.stage, "reason": f.reason} for f in record.failures],
        "loss": sum(losses) / len(losses) if losses else math.nan,
        "bytes_up": dict(record.bytes_up),
        "bytes_down": dict(record.bytes_down),
        "seconds": record.seconds,
        "seconds_local": record.seconds_local,
        # clients that train side by side can spend more seconds than the round lasts
        "seconds_overhead": max(0.0, record.seconds - record.seconds_local),
        "fingerprint": record.fingerprint,
    }


def _round(event: Event) -> Round:
    return Round(
        event["round"],
        tuple(event["clients"]),
        tuple(Failure(**failure) for failure in event["failures"]),
        _number(event["loss"]),
        event["bytes_up"],
        event["bytes_down"],
        event["seconds"],
        event["seconds_local"],
        event["seconds_overhead"],
        event["fingerprint"],
    )


def _parse(path: Path) -> Iterator[Event]:
    whole, _, _torn = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): delete that line to read the rest") from None


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
        logging.getLogger(__name__).warning("%s: dropped a torn last line of %d bytes", path, len(data) - whole)


def _finite(value: Any) -> Any:
    """``value`` with null for every number that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: _number(value) for key, value in values.items()}
