"""A run folder with invented figures, written through the interface that a run uses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedferret.core.rounds import Failure, RoundRecord
from fedferret.tracking.environment import write_environment
from fedferret.tracking.events import FILE, FORMAT, EventLog, round_fields
from fedferret.tracking.folder import explain

NASTY = '<script>alert("$x$ & co")</script>'
PARAMETERS = 1000


def record(number: int, cohort: tuple[str, ...] = ("ann", NASTY, "bob"), failing: tuple[str, ...] = ()) -> RoundRecord:
    """A round in which every client but ``failing`` replied: 10 bytes up and 7 down per client."""
    replied = [client for client in cohort if client not in failing]
    return RoundRecord(
        number,
        cohort,
        {client: {"loss": 4.0 - 0.1 * number, "seconds": 1.0} for client in replied},
        tuple(Failure(client, "local", f"{client} lost <b>power</b>") for client in failing),
        dict.fromkeys(replied, 10),
        dict.fromkeys(cohort, 7),
        f"fingerprint{number}" if number % 2 == 0 else "",
        seconds=5.0,
        seconds_local=float(len(replied)),
    )


def start(log: EventLog, **changes: Any) -> None:
    """The first event of a run."""
    fields = {"method": "ferret", "model": "tiny", "data": "toy", "rounds": 4, "clients": 9, "seed": 1}
    fields["notes"] = [f'read as: instruction, column "{NASTY}"']
    log.write("start", **{**fields, "parameters": PARAMETERS, **changes})


def evaluate(log: EventLog, number: int, loss: float, accuracy: float | None = None, mean: float | None = None) -> None:
    """An evaluation of 2 seconds on two held-out sets; the first is the main set. A classifier's with an accuracy.

    ``mean`` is that over clients.
    """
    given = {"tokens": 100} if accuracy is None else {"examples": 100, "accuracy": accuracy}
    given |= {} if mean is None else {"client-mean": mean, "worst-tenth": mean / 2, "deviation": 0.1}  # type: ignore[dict-item]
    results = {
        name: {"loss": value, "perplexity": math.exp(value), **given}
        for name, value in (("held-out rows", loss), ("held-out people", loss + 0.5))
    }
    primary = "loss" if accuracy is None else "accuracy"
    log.write("evaluation", round=number, results=results, seconds=2.0, who="global", primary=primary)


def write_run(folder: Path, rounds: int = 4, finished: bool = True) -> None:
    """A run of ``rounds`` rounds. One client fails in round 2, and one client's name contains markup."""
    log = EventLog(folder)
    (folder / "recipe.toml").write_text(f"seed = 1\n# {NASTY}\n")
    write_environment(folder)
    explain(folder)
    start(log)
    evaluate(log, 0, 5.0)
    log.write("baseline", name="local-only", loss=4.5, per_client={"ann": 4.4, NASTY: 4.6})
    for number in range(1, rounds + 1):
        log.write("round", **round_fields(record(number, failing=("bob",) if number == 2 else ())))
        evaluate(log, number, 5.0 - 0.25 * number)
    if finished:
        log.write("end", rounds=rounds)


def downgrade(folder: Path) -> None:
    """Make the event log in ``folder`` one of fedferret 0.1: its start event has no format."""
    log = folder / FILE
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert events[0].pop("format") == FORMAT
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
