"""Ratios of two measurements that alternate in one run: a busy or unknown machine affects both alike.

A benchmark yields ``Figure``s to ``main``, which prints one JSON object and one sentence, and with ``--save`` writes
the JSON to ``benchmarks/results/NAME.json``. A measurement is a callable that returns a float, such as the result of
``seconds(action)`` or a callable that returns bytes. Ratios are computed per pair, so that a temporary slowdown of the
machine affects both of a pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedferret.core.files import write_atomically
from fedferret.tracking.environment import environment

RESULTS = Path(__file__).parent / "results"

Measurement = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """The first measurement over the second, pair by pair."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def pairs(self) -> list[float]:
        """One ratio per repetition."""
        return [first / second for first, second in zip(self.first, self.second, strict=True)]

    @property
    def median(self) -> float:
        """The ratio that claims and results quote."""
        return statistics.median(self.pairs)

    def scaled(self, first: float = 1.0, second: float = 1.0) -> Ratio:
        """Both measurements multiplied, for work that was measured in part.

        Args:
            first: factor on the first measurements.
            second: factor on the second measurements.
        """
        return Ratio(tuple(value * first for value in self.first), tuple(value * second for value in self.second))


@dataclass(frozen=True)
class Figure:
    """A claim on a ratio, and the measurements."""

    claim: str  # "X against Y", as a phrase
    ratio: Ratio
    bound: Literal["at most", "at least"]
    target: float
    note: str = ""  # sizes, and which measurement was scaled
    unit: str = "s"  # of both measurements

    @property
    def reached(self) -> bool:
        """Whether the median satisfies the claim."""
        return self.ratio.median <= self.target if self.bound == "at most" else self.ratio.median >= self.target


def seconds(action: Callable[[], object]) -> Measurement:
    """A measurement of the wall-clock time of ``action``, in seconds."""

    def timed() -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    return timed


def alternate(first: Measurement, second: Measurement, repetitions: int = 7, warm_up: int = 1) -> Ratio:
    """Measure both in every turn; which goes first alternates between turns.

    Args:
        first: numerator of the ratio.
        second: denominator of the ratio.
        repetitions: number of recorded turns.
        warm_up: number of unrecorded turns before them.
    """
    values: list[tuple[float, float]] = []
    for turn in range(warm_up + repetitions):
        if turn % 2:
            after = second()
            values.append((first(), after))
        else:
            before = first()
            values.append((before, second()))
    measured = values[warm_up:]
    return Ratio(tuple(pair[0] for pair in measured), tuple(pair[1] for pair in measured))


def describe(name: str, claim: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """The JSON object of a benchmark: every figure with its ratio and both medians, and the machine.

    Args:
        name: of the benchmark's module.
        claim: of the benchmark, a sentence.
        figures: at least one.
    """
    return {
        "benchmark": name,
        "claim": claim,
        "figures": [
            {
                "claim": figure.claim,
                "target": f"{figure.bound} {_plain(figure.target)}",
                "reached": figure.reached,
                "ratio": {
                    "median": _rounded(figure.ratio.median),
                    "min": _rounded(min(figure.ratio.pairs)),
                    "max": _rounded(max(figure.ratio.pairs)),
                },
                "first": {"median": _rounded(statistics.median(figure.ratio.first)), "unit": figure.unit},
                "second": {"median": _rounded(statistics.median(figure.ratio.second)), "unit": figure.unit},
                "repetitions": len(figure.ratio.first),
                "note": figure.note,
            }
            for figure in figures
        ],
        "machine": environment(),
    }


def sentence(description: dict[str, Any]) -> str:
    """The results of a benchmark in one line.

    Args:
        description: as from ``describe``.
    """
    found = [
        f"{figure['claim']}: {_plain(figure['ratio']['median'])} "
        f"({figure['target']}: {'reached' if figure['reached'] else 'missed'})"
        for figure in description["figures"]
    ]
    return f"{description['claim']} " + "; ".join(found) + "."


def main(name: str, claim: str, figures: Callable[[], Iterator[Figure]]) -> None:
    """Run a benchmark from the command line: JSON on standard output, then a sentence; progress on standard error.

    Args:
        name: of the benchmark's module.
        claim: of the benchmark, a sentence.
        figures: measures and yields the figures.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=claim)
    parser.add_argument("--save", action="store_true", help=f"write the JSON to benchmarks/results/{name}.json")
    arguments = parser.parse_args()
    measured: list[Figure] = []
    for figure in figures():
        print(f"{figure.claim}: {_plain(figure.ratio.median)}", file=sys.stderr, flush=True)
        measured.append(figure)
    description = describe(name, claim, measured)
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    print(text + sentence(description))
    if arguments.save:
        write_atomically(RESULTS / f"{name}.json", text)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
