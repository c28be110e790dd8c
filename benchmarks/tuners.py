"""Tuners of the reference papers under skew: accuracy over rounds and bytes, on frozen or whole MiniLM.

A row is one method at one partition and seed: after every fifth round accuracy on the global test set, mean and worst
tenth over the clients' own held-out parts (of personal models where the method has them) and bytes up and down.
Finished rows are appended to ``benchmarks/results/tuners.jsonl`` and never run again, so the command resumes.

    python -m benchmarks.tuners --tune            three rates of every method, on BBC News
    python -m benchmarks.tuners                   20 Newsgroups, every method at its best rate of these
    python -m benchmarks.tuners --method ssf --seed 1
    python -m benchmarks.tuners --table           the finished rows

The work is that of ``benchmarks.classification``: 15 rounds of 5 of 20 clients, 10 steps of 16 texts of 32 tokens.
Rates were found in a third of the rounds. Every method has the same steps, batches and clipping; full-parameter methods
take plain gradient steps, adapters AdamW; ``fedit-sgd`` is the control of Ferret over FedIT, which takes plain steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.classification import TASKS, carried_out, finished, keep
from fedferret import recipe

RESULTS = Path(__file__).parent / "results" / "tuners.jsonl"
TUNED_ON, REPORTED_ON = "bbc-news", "newsgroups"
TUNING_ROUNDS, ROUNDS = 5, 15
SGD = {"optimizer": "sgd", "clip": 1.0, "batch_size": 16, "steps": 10}
ADAMW = {**SGD, "optimizer": "adamw"}


@dataclass(frozen=True)
class Contender:
    """A method in the comparison.

    Attributes:
        name: of the method in recipes.
        rates: learning rates that are tried.
        training: of the clients, without the rate.
        trainings: the keys of the method's settings that hold it.
        settings: further ones of the method.
        short: those that differ in the few rounds in which rates are found.
        model: further settings of the model.
        like: the contender that a variant takes the rate of; empty where its own is found.
    """

    name: str
    rates: tuple[float, ...] = ()
    training: Mapping[str, Any] = field(default_factory=lambda: ADAMW)
    trainings: tuple[str, ...] = ("training",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    short: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""


LORA_RATES = (1e-3, 3e-3, 1e-2)
STAGES = ("sparse_training", "training")
FULL = {"full_training": {**SGD, "learning_rate": 0.3}}  # FedAvg's rate
CONTENDERS: Mapping[str, Contender] = {
    "fedavg": Contender("fedavg", (0.3,), SGD),  # of three rates the best in benchmarks.classification, on BBC News
    "linear-probe": Contender("fedavg", (0.3, 1.0, 3.0), SGD, model={"train": "head"}),
    "fedit": Contender("fedit", LORA_RATES),
    "fedit-sgd": Contender("fedit-sgd", (0.3, 1.0, 3.0), SGD),
    "ferret": Contender("ferret", (0.1, 0.3, 1.0), SGD),
    "ssf": Contender("ssf", LORA_RATES),
    "slora": Contender("slora", LORA_RATES, trainings=STAGES, short={"sparse_rounds": 2}),
    "fibecfed": Contender("fibecfed", LORA_RATES),
    "sa-fedlora": Contender(
        "sa-fedlora", LORA_RATES, settings=FULL, short={"heating_rounds": 1, "annealing_rounds": 2}
    ),
    "fedprompt": Contender("fedprompt", (3e-3, 1e-2, 3e-2)),
    "fedpeptao": Contender("fedpeptao", (3e-3, 1e-2, 3e-2), settings={"layers": 0.5}),
    "ferret-over-fedit": Contender("ferret", (0.3, 1.0, 3.0), SGD, settings={"over": "fedit"}),
    "fibecfed-random": Contender("fibecfed", settings={"order": "random"}, like="fibecfed"),
    "fibecfed-hard-first": Contender("fibecfed", settings={"order": "hard-first"}, like="fibecfed"),
    "fibecfed-reorder": Contender("fibecfed", settings={"reorder": True, "refresh": 2}, like="fibecfed"),
    "fibecfed-all-layers": Contender("fibecfed", settings={"layers": 1.0}, like="fibecfed"),
    "fedpeptao-all-layers": Contender("fedpeptao", settings={"layers": 1.0}, like="fedpeptao"),
    "fedit-rank-4": Contender("fedit", settings={"rank": 4}, like="fedit"),
    "ffa-lora": Contender("ffa-lora", like="fedit"),
    "fedsa-lora": Contender("fedsa-lora", like="fedit"),
    "fedex-lora": Contender("fedex-lora", like="fedit"),
}


def settings(contender: Contender, task: str, alpha: float | None, clients: int, seed: int, rate: float) -> Any:
    """The recipe of one run.

    Args:
        contender: the method.
        task: a key of ``benchmarks.classification.TASKS``.
        alpha: Dirichlet concentration of the classes; None: IID.
        clients: among which the data are divided.
        seed: of the run.
        rate: learning rate.
    """
    made, rounds = TASKS[task], TUNING_ROUNDS if task == TUNED_ON else ROUNDS
    partition: dict[str, Any] = {"kind": "iid", "clients": clients}
    if alpha is not None:
        partition = {"kind": "dirichlet", "alpha": alpha, "clients": clients, "min_examples": 2}
    training = {**contender.training, "learning_rate": rate}
    own = {**contender.settings, **(contender.short if task == TUNED_ON else {})}
    return recipe(
        seed=seed,
        rounds=rounds,
        model={**made["model"], **contender.model},
        data={**made["data"], "partition": partition},
        text=made["text"],
        clients={"per_round": made["cohort"]},
        algorithm={"name": contender.name, **own, **dict.fromkeys(contender.trainings, training)},
        evaluation={"every": 5, "batch_size": 64, "local_only_clients": 0},
    )


def measured(name: str, task: str, alpha: float | None, clients: int, seed: int, rate: float) -> dict[str, Any]:
    """Run one method; its row.

    Args:
        name: a key of ``CONTENDERS``.
        task: as in ``settings``.
        alpha: as in ``settings``.
        clients: as in ``settings``.
        seed: as in ``settings``.
        rate: as in ``settings``.
    """
    summary, known, seconds = carried_out(settings(CONTENDERS[name], task, alpha, clients, seed, rate))
    curve = []
    for number, evaluation in sorted(known.evaluations.items()):
        main = next(iter(evaluation.results.values()))
        curve.append(
            {
                "round": number,
                "up": sum(summary["bytes_up_by_round"][:number]),
                "down": sum(summary["bytes_down_by_round"][:number]),
                **{each: round(main[each], 4) for each in ("accuracy", "loss", "client-mean", "worst-tenth")},
            }
        )
    head = {"task": task, "method": name, "alpha": alpha, "clients": clients, "seed": seed, "rate": rate}
    return {**head, **curve[-1], "curve": curve, "seconds": round(seconds)}


def best_rate(rows: list[dict[str, Any]], name: str) -> float | None:
    """The rate that did best of those tried; None while one of them is missing.

    The clients' mean accuracy decides, and the loss on the test set between equals.

    Args:
        rows: finished ones.
        name: a key of ``CONTENDERS``.
    """
    owner = CONTENDERS[name].like or name
    tried = {row["rate"]: row for row in rows if row["task"] == TUNED_ON and row["method"] == owner}
    if not set(CONTENDERS[owner].rates) <= set(tried):
        return None
    return max(tried, key=lambda rate: (tried[rate]["client-mean"], -tried[rate]["loss"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: mean and deviation over seeds.

    Args:
        rows: finished ones.
    """
    lines = [
        "| data | Dirichlet | clients | method | rate | seeds | test accuracy | clients' mean | worst tenth | up, MB | "
        "down, MB |",
        "|" + "---|" * 11,
    ]

    def kind(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[each]) for each in ("task", "alpha", "clients", "method", "rate"))

    for group, each in itertools.groupby(sorted(rows, key=kind), key=kind):
        some = list(each)
        cells = []
        for name in ("accuracy", "client-mean", "worst-tenth"):
            values = [row[name] for row in some]
            deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{deviation}")
        moved = [f"{statistics.fmean(row[way] for row in some) / 1e6:.3g}" for way in ("up", "down")]
        lines.append(f"| {' | '.join([*group, str(len(some)), *cells, *moved])} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=CONTENDERS, help="one method")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alpha", default="0.1", help="Dirichlet concentration, or iid (default 0.1)")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help=f"the rates of each method, on {TUNED_ON}")
    parser.add_argument("--table", action="store_true", help="print the finished rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows = finished(asked.out)
    if asked.table:
        print(table(rows))
        return
    alpha = None if asked.alpha == "iid" else float(asked.alpha)
    there = {tuple(row[each] for each in ("task", "method", "alpha", "clients", "seed", "rate")) for row in rows}
    for name, contender in CONTENDERS.items():
        if asked.method not in (None, name):
            continue
        found = best_rate(rows, name)
        if not asked.tune and found is None:
            print(f"{name}: run --tune first; not all rates are there", file=sys.stderr)
            continue
        for rate in contender.rates if asked.tune else (found,):
            assert rate is not None
            one = (
                (TUNED_ON, name, 0.1, 20, 1, rate)
                if asked.tune
                else (REPORTED_ON, name, alpha, asked.clients, asked.seed, rate)
            )
            if one in there:
                continue
            row = measured(one[1], one[0], *one[2:])
            keep(row, asked.out)


if __name__ == "__main__":
    sys.exit(main())
