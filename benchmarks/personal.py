"""Personal models, one-shot and server-side methods under skew: what each client gets, and for how many bytes.

A row is one method on one task, partition and seed: mean and worst tenth of the clients' accuracy, each on what the
client holds out (by a personal model where the method has them), accuracy of the global model on the test set where
there is one, bytes up and down, and the same after every few rounds. Finished rows are appended to
``benchmarks/results/personal.jsonl`` and never run again, so the command resumes.

    python -m benchmarks.personal --tune             three rates of every method, on the other data of the same kind
    python -m benchmarks.personal                    the grid, every method at its best rate of these
    python -m benchmarks.personal --only mnist --partition two-classes --method spafl --seed 1
    python -m benchmarks.personal --table            the finished rows
    python -m benchmarks.personal --left             what would be run, without running it

    images   MNIST (5,000) and digits, lenet5: 50 rounds of 10 clients, one local epoch in batches of 32
    heads    a head on a frozen body: 20 rounds of 20 clients, 10 steps of 16 examples; features are computed once per
             example of a process (``benchmarks/frozen_features.py``), so run as many rows in a process as possible

Rates are found at Dirichlet 0.1 with seed 1. Between the first and the last round the cohort alone is scored. Bytes are
of rounds, without those of scoring.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.classification import carried_out, finished, keep
from benchmarks.frozen_features import remembered
from benchmarks.personal_contenders import CONTENDERS, HEADS, IMAGES
from fedferret import recipe
from fedferret.algorithms.registry import catalogue
from fedferret.core.errors import RunError, UserError
from fedferret.core.metrics import LARGEST_LOSS

RESULTS = Path(__file__).parent / "results" / "personal.jsonl"
TUNING = ("dirichlet-0.1", 20, 1)  # partition, clients and seed with which rates are found
PARTITIONS: Mapping[str, Mapping[str, Any]] = {
    "two-classes": {"kind": "pathological", "classes": 2, "min_examples": 2},
    "dirichlet-0.1": {"kind": "dirichlet", "alpha": 0.1, "min_examples": 2},
    "dirichlet-1": {"kind": "dirichlet", "alpha": 1.0, "min_examples": 2},
    "iid": {"kind": "iid"},
    "owners": {},  # as the source has it
}


@dataclass(frozen=True)
class Task:
    """Data and a model.

    Attributes:
        kind: of contenders that it is for.
        model: settings of the model.
        data: those of the source, without the partition.
        tuned_on: the task on which rates are found.
        text: settings of texts.
        cohort: clients of a round.
        target: the clients' mean accuracy to which rounds and bytes are counted.
    """

    kind: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    tuned_on: str
    text: Mapping[str, Any] = field(default_factory=dict)
    cohort: int = 10
    target: float = 0.9


TEXT = {"max_tokens": 32}  # as in benchmarks.classification
MINILM, LITE = ({"name": f"packaged:{name}", "train": "head"} for name in ("minilm", "efficientnet-lite0"))
SMOLLM2 = {"name": "packaged:smollm2", "train": "head"}
NEWSGROUPS = {"source": "newsgroups", "max_held_out": 1000}
TASKS: Mapping[str, Task] = {
    "mnist": Task(IMAGES, {"name": "lenet5"}, {"source": "mnist"}, "digits"),
    "digits": Task(IMAGES, {"name": "lenet5"}, {"source": "digits"}, "digits"),
    "newsgroups": Task(HEADS, MINILM, NEWSGROUPS, "bbc-news", TEXT, 20, 0.6),
    "bbc-news": Task(HEADS, MINILM, {"source": "bbc-news"}, "bbc-news", TEXT, 20),
    "ratings": Task(HEADS, MINILM, {"source": "ratings"}, "bbc-news", TEXT, 20, 0.6),
    "mnist-lite0": Task(HEADS, LITE, {"source": "mnist"}, "digits-lite0", cohort=20),
    "digits-lite0": Task(HEADS, LITE, {"source": "digits"}, "digits-lite0", cohort=20),
    "bbc-news-smollm2": Task(HEADS, SMOLLM2, {"source": "bbc-news"}, "bbc-news", TEXT, 20),
}
ROUNDS, EVERY = {IMAGES: 50, HEADS: 20}, {IMAGES: 2, HEADS: 1}


@dataclass(frozen=True)
class Part:
    """A part of the grid; ``methods`` are those of the task's kind where none are named."""

    task: str
    partition: str
    clients: int = 20
    seeds: tuple[int, ...] = (1,)
    methods: tuple[str, ...] = ()


THREE = (1, 2, 3)
GRID = (
    Part("mnist", "two-classes", seeds=THREE),
    Part("mnist", "dirichlet-0.1", seeds=THREE),
    Part("newsgroups", "dirichlet-0.1", seeds=THREE),
    Part("mnist", "iid", seeds=THREE, methods=("fedavg", "fedprox", "fedptr")),
    Part("digits", "dirichlet-0.1", seeds=(2,)),  # rates were found on it with seed 1
    Part("mnist", "dirichlet-1"),
    Part("mnist", "two-classes", 100),
    Part("mnist-lite0", "dirichlet-0.1"),
    Part("ratings", "owners", 718),
    Part("bbc-news-smollm2", "dirichlet-0.1"),
)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    task: str
    partition: str
    clients: int
    method: str
    seed: int
    rate: float | None

    def key(self) -> tuple[Any, ...]:
        """What tells a finished row from others."""
        return (self.task, self.partition, self.clients, self.method, self.seed, self.rate)


def settings(cell: Cell) -> Any:
    """The recipe of one run.

    Args:
        cell: what to run.
    """
    task, contender = TASKS[cell.task], CONTENDERS[TASKS[cell.task].kind][cell.method]
    parts = PARTITIONS[cell.partition]
    data = {**task.data, "partition": {**parts, "clients": cell.clients}} if parts else task.data
    rounds = contender.rounds or ROUNDS[task.kind]
    return recipe(
        seed=cell.seed,
        rounds=rounds,
        model={**task.model, **contender.model},
        data=data,
        text=task.text,
        clients={"per_round": cell.clients if contender.all_clients else min(task.cohort, cell.clients)},
        algorithm=contender.algorithm(cell.rate),
        pool={"norm_limit": "off"},  # where most clients have fitted their data, the median of their updates is tiny
        evaluation={"every": EVERY[task.kind], "batch_size": 64, "local_only_clients": 0},
    )


def measured(cell: Cell, known: dict[str, dict[bytes, Tensor]]) -> dict[str, Any]:
    """Run one cell; its row.

    Args:
        cell: what to run.
        known: features of frozen bodies, by model; they are added to.
    """
    asked = settings(cell)
    frozen = asked.model.train == "head"
    head = {
        "task": cell.task,
        "partition": cell.partition,
        "clients": cell.clients,
        "method": cell.method,
        "seed": cell.seed,
        "rate": cell.rate,
        "rounds": asked.rounds,
    }
    try:
        with remembered(known.setdefault(asked.model.name, {})) if frozen else nullcontext():
            summary, events, seconds = carried_out(asked)
    except RunError as error:  # a rate that is too high
        return {**head, "failed": str(error), "client-mean": 0.0, "worst-tenth": 0.0, "loss": LARGEST_LOSS}
    shown = ["client-mean", "worst-tenth", "loss", *(["accuracy"] if asked.algorithm.has_global_model else [])]
    curve, densities = [], summary.get("density_by_round", [])
    for number, evaluation in sorted(events.evaluations.items()):
        main = next(iter(evaluation.results.values()))
        point = {"round": number, **{name: round(main[name], 4) for name in shown}}
        point |= {way: sum(summary[f"bytes_{way}_by_round"][:number]) for way in ("up", "down")}
        if densities and number:
            point["density"] = round(densities[number - 1], 4)  # of that round's cohort, after training
        curve.append(point)
    trips = sum(len(each.bytes_up) for each in events.rounds.values())
    moved = {f"{way}_per_client_round": round(curve[-1][way] / trips) for way in ("up", "down")}
    failures = len(events.failures)
    also = {"failures": failures} if failures else {}
    return {**head, **curve[-1], **moved, **also, "seconds": round(seconds), "curve": curve}


def best_rate(rows: Iterable[Mapping[str, Any]], task: str, method: str) -> float | None:
    """The rate that did best of those tried: the clients' mean decides, and the loss between equals.

    Args:
        rows: finished ones.
        task: that the rate is for.
        method: a contender with rates.

    Raises:
        LookupError: one of the rates was not tried yet.
    """
    contenders = CONTENDERS[TASKS[task].kind]
    owner = contenders[method].like or method
    wanted = contenders[owner].rates
    if len(wanted) < 2:
        return wanted[0] if wanted else None
    place = (TASKS[task].tuned_on, *TUNING[:2], owner, TUNING[2])
    tried = {row["rate"]: row for row in rows if _place(row) == place}
    if missing := set(wanted) - set(tried):
        raise LookupError(f"{method} for {task}: run --tune first, for the rates {sorted(missing)}")
    return max(wanted, key=lambda rate: (tried[rate]["client-mean"], -tried[rate]["loss"]))


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[each] for each in ("task", "partition", "clients", "method", "seed"))


def tuning() -> Iterator[Cell]:
    """The runs in which rates are found, on each task that another takes its rates of."""
    partition, clients, seed = TUNING
    for task in dict.fromkeys(TASKS[part.task].tuned_on for part in GRID):
        for name, contender in CONTENDERS[TASKS[task].kind].items():
            for rate in contender.rates if len(contender.rates) > 1 else ():
                yield Cell(task, partition, clients, name, seed, rate)


def grid(rows: Sequence[Mapping[str, Any]]) -> Iterator[Cell]:
    """The runs of the grid, the first seed of every part first; those without a rate are named and left out.

    Args:
        rows: finished ones, of tuning among others.
    """
    for number, part in itertools.product(range(len(THREE)), GRID):
        for method in part.methods or CONTENDERS[TASKS[part.task].kind]:
            if number < len(part.seeds):
                try:
                    rate = best_rate(rows, part.task, method)
                except LookupError as error:
                    print(error, file=sys.stderr)
                    continue
                yield Cell(part.task, part.partition, part.clients, method, part.seeds[number], rate)


def reached(row: Mapping[str, Any], target: float) -> Mapping[str, Any] | None:
    """The first evaluation at which the clients' mean accuracy is at least ``target``.

    Args:
        row: a finished one.
        target: accuracy.
    """
    return next((each for each in row.get("curve", ()) if each["client-mean"] >= target), None)


def table(rows: Sequence[Mapping[str, Any]], target: float | None) -> str:
    """The rows as Markdown: mean and deviation over seeds.

    Args:
        rows: finished ones.
        target: the clients' mean accuracy to which rounds and bytes are counted; None: the task's.
    """
    lines = [
        "| data | partition | clients | method | rate | seeds | clients' mean | worst tenth | global | density | "
        "up, B | down, B | to target: rounds | MB |",
        "|" + "---|" * 14,
    ]

    def kind(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[each]) for each in ("task", "partition", "clients", "method", "rate"))

    for group, each in itertools.groupby(sorted(rows, key=kind), key=kind):
        some = list(each)
        cells = [_mean(some, name) for name in ("client-mean", "worst-tenth", "accuracy", "density")]
        moved = [_mean(some, f"{way}_per_client_round", ",.0f") for way in ("up", "down")]
        found = [hit for row in some if (hit := reached(row, target or TASKS[group[0]].target))]
        few = f" ({len(found)} of {len(some)})" if 0 < len(found) < len(some) else ""
        there = ["", ""]
        if found:
            there = [
                f"{statistics.fmean(hit['round'] for hit in found):.3g}{few}",
                f"{statistics.fmean(hit['up'] + hit['down'] for hit in found) / 1e6:.3g}",
            ]
        lines.append(f"| {' | '.join([*group, str(len(some)), *cells, *moved, *there])} |")
    return "\n".join(lines)


def _mean(rows: Iterable[Mapping[str, Any]], name: str, form: str = ".3f") -> str:
    """Mean and deviation of a figure; empty where no row has it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 and form == ".3f" else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TASKS, help="one task")
    parser.add_argument("--partition", choices=PARTITIONS, help="one partition")
    parser.add_argument("--method", action="append", help="one method; may be given several times")
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--tune", action="store_true", help="the rates of each method")
    parser.add_argument("--table", action="store_true", help="print the finished rows")
    parser.add_argument("--left", action="store_true", help="print what would be run")
    parser.add_argument("--target", type=float, help="of --table: the clients' mean accuracy to which is counted")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows = finished(asked.out)
    if asked.table:
        print(table(rows, asked.target))
        return
    known: dict[str, dict[bytes, Tensor]] = {}
    there = {(*_place(row), row["rate"]) for row in rows}
    for cell in tuning() if asked.tune else grid(rows):
        if CONTENDERS[TASKS[cell.task].kind][cell.method].name not in catalogue():
            continue
        wanted = [(asked.only, cell.task), (asked.partition, cell.partition), (asked.seed, cell.seed)]
        if any(given not in (None, own) for given, own in wanted) or cell.key() in there:
            continue
        if asked.method and cell.method not in asked.method:
            continue
        if asked.left:
            print(*cell.key())
            continue
        try:
            row = measured(cell, known)
        except UserError as error:
            print(f"{cell.method} for {cell.task}: {error}", file=sys.stderr)
            continue
        keep(row, asked.out)


if __name__ == "__main__":
    sys.exit(main())
