"""The event log of a run: ``events.jsonl``, one JSON object per line, appended as events happen.

    {"event": "start", "time": "2026-11-22T19:01:40+00:00", "format": 2, "method": "ferret", ...}
    {"event": "round", "time": "2026-11-22T19:02:11+00:00", "round": 3, "clients": ["a", "b"], ...}

Lines are only appended, and each is flushed to disk as a whole. A crash can tear the last line: readers skip it, and
the next writer cuts it off and logs a warning. A resumed run repeats the rounds after its checkpoint. Therefore the
last event of a kind and round holds, and ``resume`` at round r discards all events of later rounds. ``rewind`` to
round r does so too, but keeps the count of the bytes that were sent for them.
A number that is NaN or infinite is written as ``null`` (JSON has neither) and read as NaN, seconds as 0.
``format`` in the ``start`` event is the version of the file. Format 1 had no such field; fedferret 0.1 wrote it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError
from fedferret.core.exchanges import Failure
from fedferret.core.files import flush, inside, read_intact
from fedferret.core.log import RESTORE
from fedferret.core.rounds import RoundRecord
from fedferret.tracking.client_lists import ClientList
from fedferret.tracking.run_facts import ChangedData
from fedferret.tracking.run_facts import Rewind as Rewind
from fedferret.wire.ledger import Ledger

FILE = "events.jsonl"
FORMAT = 2  # of the file; 1 before fedferret 0.2
Event = dict[str, Any]


class EventLog:
    """Appends to the event log of the run in ``folder``. An existing log continues after its last whole line.

    Raises:
        UserError: if an existing log has another format or its first line is damaged.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        check_format(folder)
        _cut_torn_line(self._path)

    def write(self, kind: str, /, *, flushed: bool = True, **fields: Any) -> None:
        """Append one event.

        Args:
            kind: of the event, such as "round". A "start" event also gets the file's format.
            flushed: when the call returns, the line is on disk; without, a crash may lose it.
            fields: JSON values.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        version = {"format": FORMAT} if kind == "start" else {}
        event = {"event": kind, "time": now, **version, **_finite(fields)}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        with self._path.open("ab") as file:
            first = not file.tell()
            file.write(line.encode())
            file.flush()
            if flushed:
                os.fsync(file.fileno())
        if first:
            flush(self._path.parent)


def read_events(folder: Path) -> list[Event]:
    """All whole lines of the event log, oldest first.

    Raises:
        UserError: if ``folder`` has no event log, the log has another format, or a line is damaged.
        RunError: if the log cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{folder} is not a run folder: it has no {FILE}; give the folder that `fedferret run` wrote")
    return list(_parse(path))


def check_format(folder: Path) -> None:
    """Refuse the event log in ``folder`` if it has another format. A folder without a log passes.

    Raises:
        UserError: if the log's format is not ``FORMAT``, with the version of fedferret that reads it.
    """
    path = folder / FILE
    if path.exists():
        next(_parse(path), None)


@dataclass(frozen=True)
class Evaluation:
    """Scores of the model after ``round`` (0: before tuning), by held-out set. The first set is the main set."""

    round: int
    results: Mapping[str, Mapping[str, float]]  # by held-out set: loss (nats per token), perplexity, tokens, ...
    seconds: float
    who: str  # the evaluated model; "global": the server's
    per_client: Mapping[str, float] = field(default_factory=dict)  # each client's primary figure, on what it holds out
    moved: Mapping[str, int] = field(default_factory=dict)  # bytes, both ways, by client that scored
    primary: str = "loss"  # the figure by which clients are compared
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # all figures, by client
    unscored: Mapping[str, str] = field(default_factory=dict)  # why a client that was asked has none

    @property
    def loss(self) -> float:
        """The main held-out set's loss."""
        return next(iter(self.results.values()))["loss"]

    @property
    def perplexity(self) -> float | None:
        """The main held-out set's perplexity; None where the model is no language model."""
        return next(iter(self.results.values())).get("perplexity")


@dataclass(frozen=True)
class Baseline:
    """A reference that tuning is compared with: losses on the main held-out set."""

    name: str
    loss: float  # mean
    per_client: Mapping[str, float]  # empty if the baseline has none
    spread: Mapping[str, float] = field(default_factory=dict)  # over clients, each on what it holds out itself


@dataclass(frozen=True)
class Round:
    """One round, as the event log has it. Seconds are wall-clock time; bytes include catching up."""

    round: int
    clients: tuple[str, ...]  # sampled, in the cohort's order
    failures: tuple[Failure, ...]
    loss: float  # mean training loss over the client updates
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    seconds: float
    seconds_local: float
    seconds_overhead: float
    fingerprint: str
    bounded: tuple[str, ...] = ()  # clients with a claim of examples that counted for less than it said
    brought: Mapping[str, int] = field(default_factory=dict)  # of ``bytes_down``, what scoring had brought already
    density: Mapping[str, float] = field(default_factory=dict)  # share of weights that a client's sparse model keeps


@dataclass
class Run:
    """A run as its event log has it, finished or not."""

    start: Event = field(default_factory=dict)
    rounds: dict[int, Round] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    baselines: dict[str, Baseline] = field(default_factory=dict)
    rewinds: list[Rewind] = field(default_factory=list)
    changed_data: list[ChangedData] = field(default_factory=list)
    lists: list[ClientList] = field(default_factory=list)  # by round, where another list of clients began
    notices: list[tuple[int, str, str]] = field(default_factory=list)  # round, client, the client's words
    status: str = "in progress"  # "finished", "interrupted", "rewound"
    last: str = ""  # ISO time of the last event

    @property
    def done(self) -> int:
        """The last completed round; 0 before the first."""
        return max(self.rounds, default=0)

    @property
    def planned(self) -> int:
        """Rounds in the recipe."""
        return int(self.start.get("rounds", self.done))

    @property
    def failures(self) -> list[tuple[int, Failure]]:
        """Every failure with its round."""
        return [(number, failure) for number in sorted(self.rounds) for failure in self.rounds[number].failures]

    @property
    def epoch(self) -> int:
        """0, or that of the last rewinding."""
        return max((rewind.epoch for rewind in self.rewinds), default=0)

    def ledger(self) -> Ledger:
        """The bytes of all rounds, those of scoring at the clients, and those of discarded rounds."""
        ledger = Ledger(int(self.start.get("parameters", 0)), discarded=sum(each.bytes for each in self.rewinds))
        for number, entry in sorted(self.rounds.items()):
            ledger.add(number, entry.bytes_up, entry.bytes_down, entry.brought)
        for number, evaluation in sorted(self.evaluations.items()):
            ledger.add_scores(number, evaluation.moved)
        return ledger


def read(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        UserError: if ``folder`` has no event log, the log has another format, a line is damaged or a round is missing.
        RunError: if the log cannot be read.
    """
    found, line = read_events(folder), 0

    def counted() -> Iterator[Event]:
        nonlocal line
        for line, event in enumerate(found, start=1):  # noqa: B007  # read below
            yield event

    try:
        run = replay(counted())
        fault = _fault(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / FILE}, line {line} is damaged ({reason}): {RESTORE}") from None
    if fault:
        raise UserError(f"{folder / FILE} is damaged ({fault}): {RESTORE}")
    return run


def _fault(run: Run) -> str:
    """What a whole log cannot have, which the files that are made of it would stumble over; "" if nothing."""
    if gaps := sorted({*range(1, run.done + 1)} ^ run.rounds.keys()):
        return f"it has no round {gaps[0]}" if gaps[0] > 0 else f"it has a round {gaps[0]}"
    for number, entry in run.rounds.items():
        if any(failure.client not in entry.clients for failure in entry.failures):
            return f"a client failed in round {number} that was not sampled"
    for number, evaluation in run.evaluations.items():
        if not evaluation.results or not all("loss" in each for each in evaluation.results.values()):
            return f"the evaluation after round {number} has no loss"
    return ""


def replay(events: Iterable[Event]) -> Run:
    """Reconstruct a run from its events. The last event of a kind and round holds."""
    run = Run()
    for event in events:
        match event["event"]:
            case "start":
                run = Run(start=event)
            case "resume":
                _cut(run, event["round"])
                run.status = "in progress"
                if "data_fingerprint" in event:
                    before = run.changed_data[-1].event if run.changed_data else run.start
                    run.changed_data.append(ChangedData.of(before, event))
            case "rewind":
                _rewind(run, event)
            case "clients":
                run.lists.append(ClientList.of(event))
            case "notice":
                run.notices.append((event["round"], event["client"], event["note"]))
            case "round":
                run.rounds[event["round"]] = _round(event)
            case "saved":
                run.rounds[event["round"]] = _with_saving(run.rounds[event["round"]], _seconds(event["seconds"]))
            case "evaluation":
                results = {name: _floats(scores) for name, scores in event["results"].items()}
                losses = _floats(event.get("per_client", {}))
                seconds, who, moved = _seconds(event["seconds"]), event.get("who", "global"), event.get("bytes", {})
                clients = {client: _floats(scores) for client, scores in event.get("clients", {}).items()}
                scored = event.get("primary", "loss"), clients, event.get("unscored", {})
                run.evaluations[event["round"]] = Evaluation(
                    event["round"], results, seconds, who, losses, moved, *scored
                )
            case "baseline":
                per_client = _floats(event.get("per_client", {}))
                spread = _floats(event.get("spread", {}))
                run.baselines[event["name"]] = Baseline(event["name"], _float(event["loss"]), per_client, spread)
            case "end":
                run.status = "finished"
            case "interrupted":
                run.status = "interrupted"
        run.last = event["time"]
    return run


def _cut(run: Run, last: int) -> None:
    """Take the rounds after ``last`` out of the run."""
    run.rounds = {number: entry for number, entry in run.rounds.items() if number <= last}
    run.evaluations = {number: entry for number, entry in run.evaluations.items() if number <= last}
    run.lists = [each for each in run.lists if each.round <= last]
    run.notices = [notice for notice in run.notices if notice[0] <= last]
    run.changed_data = [replace(each, round=min(each.round, last)) for each in run.changed_data]  # it stays so


def _rewind(run: Run, event: Event) -> None:
    """Go back to a round, and count what was sent for the later ones."""
    later = [entry for number, entry in run.rounds.items() if number > event["round"]]
    scored = [entry for number, entry in run.evaluations.items() if number > event["round"]]
    sent = sum(sum(entry.bytes_up.values()) + sum(entry.bytes_down.values()) for entry in later)
    sent += sum(sum(entry.moved.values()) for entry in scored) - sum(sum(entry.brought.values()) for entry in later)
    _cut(run, event["round"])
    discarded = tuple(sorted(entry.round for entry in later))
    names = tuple(event["retired"]), tuple(event["begun_anew"])
    run.rewinds.append(Rewind(event["round"], event["epoch"], discarded, sent, *names))
    run.status = "rewound"


def round_fields(record: RoundRecord) -> dict[str, Any]:
    """The fields of a ``round`` event, from a record of the round loop."""
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
        # clients that train in parallel can spend more seconds than the round lasts
        "seconds_overhead": max(0.0, record.seconds - record.seconds_local),
        "fingerprint": record.fingerprint,
        "bounded": list(record.bounded),
        "brought": dict(record.brought),
        "density": {name: metrics["density"] for name, metrics in record.metrics.items() if "density" in metrics},
    }


def _round(event: Event) -> Round:
    return Round(
        event["round"],
        tuple(event["clients"]),
        tuple(Failure(**failure) for failure in event["failures"]),
        _float(event["loss"]),
        event["bytes_up"],
        event["bytes_down"],
        _seconds(event["seconds"]),
        _seconds(event["seconds_local"]),
        _seconds(event["seconds_overhead"]),
        event["fingerprint"],
        tuple(event.get("bounded", ())),
        event.get("brought", {}),
        _floats(event.get("density", {})),
    )


def _with_saving(entry: Round, seconds: float) -> Round:
    """The round with the seconds that writing it down took, which are overhead."""
    return replace(entry, seconds=entry.seconds + seconds, seconds_overhead=entry.seconds_overhead + seconds)


def _parse(path: Path) -> Iterator[Event]:
    whole, _, _torn = read_intact(inside(path.parent, path), RESTORE).rpartition(b"\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): {RESTORE}") from None
        if not isinstance(event, dict) or not all(isinstance(event.get(name), str) for name in ("event", "time")):
            raise UserError(f"{path}, line {number} is no event with a kind and a time: {RESTORE}")
        if event["event"] == "start" and event.get("format") != FORMAT:
            raise UserError(f"{path} was {_other_format(event.get('format'))}")
        yield event


def _other_format(version: object) -> str:
    if isinstance(version, int) and version > FORMAT:
        return f"written by a newer fedferret (format {version}; this one reads {FORMAT}): update fedferret"
    return 'written by fedferret 0.1; pip install "fedferret==0.1.*" reads it'


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
        logging.getLogger(__name__).warning("%s: dropped a torn last line of %d bytes", path, len(data) - whole)


def _finite(value: Any) -> Any:
    """``value`` with None for every NaN or infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _seconds(value: float | None) -> float:
    return 0.0 if value is None else value  # sums and shares go on without a time that is not known


def _floats(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: _float(value) for key, value in values.items()}
