"""Equal bytes: Ferret, plain top-k and FedAvg at so many bytes up, each at the best of the same grid of rates.

A row is one method at one pair of rates, the clients' and the server's, on one task and seed: held-out loss after
rounds, bytes as encoded. Finished rows are appended to ``benchmarks/results/equal-bytes.jsonl`` and never run again,
so the command resumes. Rates are found on one task and reported on another.

    python -m benchmarks.equal_bytes --tune                   every pair of rates, on tasks that no reported row has
    python -m benchmarks.equal_bytes --only small             each method at its best pair
    python -m benchmarks.equal_bytes --only smollm2 --seed 1  the large model, at pairs found on the small one
    python -m benchmarks.equal_bytes --table                  the finished rows, as shares of FedAvg's loss reduction

    small      3.2 million weights, 27 reasoning tasks, a client each, four sampled a round, 60 rounds
    fixed      the same rows in four organisations by Dirichlet 0.5, all in every round
    long       as small, 150 rounds
    smollm2    134.5 million weights, chitchat, four sampled a round, 40 rounds
    tune       as small, 15 other tasks, 24 rounds

Clients count alike in every row. The client's rate is 0.1 or 0.3 for the small model and ten times less for the large
one; the server's is 1, 2, 4 or 8, and 16 where 8 is best.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.classification import carried_out, finished, keep
from fedferret import recipe
from fedferret.core.errors import RunError, UserError

RESULTS = Path(__file__).parent / "results" / "equal-bytes.jsonl"
RATES, SERVER_RATES = (0.1, 0.3), (1.0, 2.0, 4.0, 8.0, 16.0)
OTHER_TASKS = [  # none of the source's defaults
    *("binary_alternation", "countdown", "course_schedule", "group_anagrams", "largest_island", "letter_jumble"),
    *("list_functions", "number_format", "number_sequence", "number_sorting", "palindrome_generation"),
    *("power_function", "sentence_reordering", "simple_integration", "word_sorting"),
]


@dataclass(frozen=True)
class Task:
    """A model, its data and a cohort.

    Attributes:
        model: name of it.
        data: settings of the source.
        rounds: number of rounds.
        every: rounds between evaluations.
        tuned_on: task on which rates are found; empty for those.
        tokens: of an example, at most.
        batch_size: of a local step; there are five.
        rate: times the client's rate of the small model.
    """

    model: str
    data: Mapping[str, Any]
    rounds: int
    every: int
    tuned_on: str = ""
    tokens: int = 128
    batch_size: int = 2
    rate: float = 1.0


CHAT = "recipes/small/chat-3m"
REASONING = {"source": "reasoning-gym"}
OTHER = {**REASONING, "tasks": OTHER_TASKS, "held_out_tasks": 0}
FOUR = {"client": "partition", "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 4, "min_examples": 50}}
TASKS: Mapping[str, Task] = {
    "tune": Task(CHAT, OTHER, 24, 12),
    "small": Task(CHAT, REASONING, 60, 20, "tune"),
    "fixed": Task(CHAT, {**REASONING, **FOUR}, 60, 20, "tune"),
    "long": Task(CHAT, REASONING, 150, 30, "tune"),
    "smollm2": Task("packaged:smollm2", {"source": "chitchat", "max_held_out": 64}, 40, 10, "tune", 64, 1, 0.1),
}


@dataclass(frozen=True)
class Contender:
    """A method at so many bytes.

    Attributes:
        name: of the method in recipes.
        settings: of the method.
        large: where they differ for the large model, so that the message is as long.
        tasks: on which it is run, beside those on which rates are found.
        like: the contender that it takes the rates of; empty where its own are found.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    large: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("small", "fixed", "long", "smollm2")
    like: str = ""


def _top_k(values: int, bits: int, large: int, *tasks: str) -> Contender:
    """FedAvg's largest values; without error feedback, since sampled clients hardly ever return."""
    settings = {"values": values, "bits": bits, "error_feedback": False}
    return Contender("fedavg-top-k", settings, {"values": large}, tasks or Contender.tasks)


def _with_feedback(values: int, bits: int, like: str) -> Contender:
    return Contender("fedavg-top-k", {"values": values, "bits": bits}, tasks=("fixed",), like=like)


ONCE = {"norms_every": 0}
SIGNS, BYTES = "top-k, signs, 0.7 to 0.9 KB", "top-k, 8 bits, 0.7 to 1 KB"
CONTENDERS: Mapping[str, Contender] = {
    "fedavg": Contender("fedavg"),
    SIGNS: _top_k(1030, 1, 416),
    "ferret": Contender("ferret"),
    "ferret 230, norms once": Contender("ferret", {**ONCE, "coordinates": 230}),
    "top-k, signs, 270 B": _top_k(330, 1, 105),
    BYTES: _top_k(420, 8, 284, "small", "fixed", "smollm2"),
    "ferret, norms once": Contender("ferret", ONCE, like="ferret"),
    "ferret, of 2,048": Contender("ferret", {"coordinates": 443, "group_size": 2048}, like="ferret"),
    "top-k, signs, error feedback": _with_feedback(1030, 1, SIGNS),
    "top-k, 8 bits, error feedback": _with_feedback(420, 8, BYTES),
    "ferret 64, norms once": Contender("ferret", {**ONCE, "coordinates": 64}, tasks=("small", "smollm2")),
    "top-k, signs, 102 B": _top_k(70, 1, 28, "small", "smollm2"),
    "ferret, 10 KB": Contender("ferret", {"coordinates": 9600}, tasks=("small",)),
    "top-k, signs, 10 KB": _top_k(19000, 1, 0, "small"),
    "ferret, 100 KB": Contender("ferret", {"coordinates": 98304}, tasks=("small",)),
    "top-k, signs, 100 KB": _top_k(260000, 1, 0, "small"),
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    method: str
    seed: int
    rate: float
    server_rate: float

    def key(self) -> tuple[Any, ...]:
        """What tells a finished row from others."""
        return (self.task, self.method, self.seed, self.rate, self.server_rate)


def settings(cell: Cell) -> Any:
    """The recipe of one run.

    Args:
        cell: what to run.
    """
    task, contender = TASKS[cell.task], CONTENDERS[cell.method]
    large = contender.large if task.model != CHAT else {}
    return recipe(
        seed=cell.seed,
        rounds=task.rounds,
        model={"name": task.model},
        data=task.data,
        text={"cut": "prompt", "max_tokens": task.tokens},
        clients={"per_round": 4},
        algorithm={
            "name": contender.name,
            "weighting": "equal",
            "server_learning_rate": cell.server_rate,
            **contender.settings,
            **large,
            "training": {"learning_rate": cell.rate * task.rate, "batch_size": task.batch_size, "steps": 5},
        },
        evaluation={"every": task.every, "batch_size": 32, "local_only_clients": 0},
    )


def measured(cell: Cell) -> dict[str, Any]:
    """Run one cell; its row, with an infinite loss where the run broke.

    Args:
        cell: what to run.
    """
    head = dict(zip(("task", "method", "seed", "rate", "server_rate"), cell.key(), strict=True))
    try:
        summary, events, seconds = carried_out(settings(cell))
    except RunError as error:  # rates that are too high
        return {**head, "failed": str(error), "start": 0.0, "loss": float("inf"), "up": 0, "total": 0, "curve": {}}
    losses = {
        number: round(next(iter(each.results.values()))["loss"], 4)
        for number, each in sorted(events.evaluations.items())
    }
    rounds = max(losses)
    trips = sum(len(each.bytes_up) for each in events.rounds.values())
    up, down = (sum(summary[f"bytes_{way}_by_round"]) for way in ("up", "down"))
    return {
        **head,
        "start": losses[0],
        "loss": losses[rounds],
        "up": round(up / trips),
        "total": up + down,
        "curve": losses,
        "seconds": round(seconds),
    }


def best_rates(rows: Sequence[Mapping[str, Any]], task: str, method: str) -> tuple[float, float] | None:
    """The pair of rates with the lowest last loss on the task for rates; None before any was tried.

    Args:
        rows: finished ones.
        task: that the rates are for.
        method: a contender.
    """
    owner = CONTENDERS[method].like or method
    tried = [row for row in rows if row["task"] == TASKS[task].tuned_on and row["method"] == owner]
    if not tried:
        return None
    return _rates(min(tried, key=lambda row: row["loss"]))


def tuning(rows: list[dict[str, Any]], task: str) -> Iterator[Cell]:
    """Every client's rate with the server's rates in turn, until a larger one is worse.

    Args:
        rows: finished ones; those of the cells that were given are expected to be added.
        task: on which rates are found.
    """
    for method, contender in CONTENDERS.items():
        if contender.like:
            continue
        for rate in RATES:
            last = float("inf")
            for server_rate in SERVER_RATES:
                cell = Cell(task, method, 1, rate, server_rate)
                yield cell
                loss = next((row["loss"] for row in rows if _key(row) == cell.key()), last)
                if loss > last:
                    break
                last = loss


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "method", "seed", "rate", "server_rate"))


def _rates(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["rate"], row["server_rate"]


def reported(rows: Sequence[Mapping[str, Any]], task: str) -> Iterator[Cell]:
    """Every method at its best pair of rates, the first seed of all first.

    Args:
        rows: finished ones, of tuning among others.
        task: that is reported.
    """
    for seed, (method, contender) in itertools.product((1, 2, 3), CONTENDERS.items()):
        if task in contender.tasks and (pair := best_rates(rows, task, method)):
            yield Cell(task, method, seed, *pair)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, with shares of what FedAvg has at the best rates it was run with, seed by seed.

    Args:
        rows: finished ones.
    """
    lines = ["| task | method | rates | bytes up | loss | share of FedAvg's reduction | seeds |", "|" + "---|" * 7]

    def kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["task"], row["method"], row["rate"], row["server_rate"]

    for (task, method, *rates), group in itertools.groupby(sorted(rows, key=kind), key=kind):
        some = list(group)
        own = [row for row in rows if row["task"] == task and row["method"] == "fedavg"]
        best = min(own, key=lambda row: row["loss"], default=None)
        control = {row["seed"]: row for row in own if best and _rates(row) == _rates(best)}
        shares = [
            (row["start"] - row["loss"]) / (row["start"] - control[row["seed"]]["loss"])
            for row in some
            if row["seed"] in control and "failed" not in row
        ]
        share = ""
        if shares:
            deviation = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
            share = f"{100 * statistics.fmean(shares):.1f}%{deviation}"
        up = statistics.fmean(row["up"] for row in some)
        loss = statistics.fmean(row["loss"] for row in some)
        lines.append(
            f"| {task} | {method} | {rates[0]:g}, {rates[1]:g} | {up:,.0f} | {loss:.3f} | {share} | {len(some)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TASKS, help="one task")
    parser.add_argument("--method", action="append", choices=CONTENDERS, help="one method; may be given several times")
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--rates", type=float, nargs=2, metavar=("CLIENT", "SERVER"), help="this pair, not the best")
    parser.add_argument("--tune", action="store_true", help="find rates")
    parser.add_argument("--table", action="store_true", help="print the finished rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows = finished(asked.out)
    if asked.table:
        print(table(rows))
        return
    tasks = [asked.only] if asked.only else [name for name in TASKS if bool(TASKS[name].tuned_on) != asked.tune]
    for task in tasks:
        if asked.rates:
            cells = (Cell(task, method, asked.seed or 1, *asked.rates) for method in asked.method or CONTENDERS)
        else:
            cells = reported(rows, task) if TASKS[task].tuned_on else tuning(rows, task)
        for cell in cells:
            if (asked.method and cell.method not in asked.method) or asked.seed not in (None, cell.seed):
                continue
            if cell.key() in {_key(row) for row in rows}:
                continue
            try:
                row = measured(cell)
            except UserError as error:
                raise SystemExit(f"{cell.method} for {task}: {error}") from error
            rows.append(row)
            keep(row, asked.out)


if __name__ == "__main__":
    sys.exit(main())
