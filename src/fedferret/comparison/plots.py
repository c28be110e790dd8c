"""The plots of a comparison, in the report's style: a colour, a dash and a mark per row, a band over the seeds.

A row has the same style in all plots. The style follows from the row's position in the grid, not from its results.
In the page the legend is text below the plot, which a phone can show. The files in plots/ are SVG and PNG and contain
the legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedferret.comparison.results import Comparison, Point, RowResult
from fedferret.core.files import build_atomically, write_atomically
from fedferret.core.text import shortened
from fedferret.tracking.plots import LIGHT, SIZE, Plot, bytes_axis, drawn
from fedferret.tracking.units import as_bytes, as_loss

COLOURS = {  # light, dark; neighbours in the list differ in lightness too, for colour-blind readers
    "series-1": ("#1765b3", "#5aa9f0"),
    "series-2": ("#d9660a", "#ffa24d"),
    "series-3": ("#2b8a3e", "#6fd086"),
    "series-4": ("#7b3fb0", "#b98cf0"),
    "series-5": ("#c9243f", "#ff7085"),
    "series-6": ("#0797a6", "#45d3e0"),
    "series-7": ("#8a5a2b", "#c99a66"),
    "series-8": ("#d6409f", "#ff8fd0"),
}
MARKS = (("o", ""), ("s", "5 2.5"), ("^", "1.5 2"))  # the mark, and the dash of the line in units of 2 points
_LONGEST_LABEL = 44


@dataclass(frozen=True)
class Style:
    """The style of a row. Rows use all colours with the first mark, then with the next."""

    colour: str  # a name in ``COLOURS``
    mark: str
    dash: str

    @property
    def light(self) -> str:
        """The colour on white, as hexadecimal digits."""
        return COLOURS[self.colour][0]

    @property
    def line(self) -> Any:
        """The dash as a matplotlib line style."""
        return (0, tuple(float(part) for part in self.dash.split())) if self.dash else "-"


def styles(comparison: Comparison) -> dict[str, Style]:
    """The style of every row by label, in the order of the grid. Beyond 24 rows the styles repeat.

    Args:
        comparison: of a grid.

    Returns:
        Colour, mark and dashes by label.
    """
    names = list(COLOURS)
    return {
        row.label: Style(names[number % len(names)], *MARKS[number // len(names) % len(MARKS)])
        for number, row in enumerate(comparison.grid.rows)
    }


def draw(comparison: Comparison) -> list[Plot]:
    """Every plot with data, without legends. Also writes plots/NAME.svg and plots/NAME.png with legends.

    Args:
        comparison: of a grid.

    Returns:
        The plots, in the order of the page.
    """
    plots, figure = [], comparison.grid.figure
    for name, title, paint in (
        (f"{figure}-by-round", f"{figure.capitalize()} against rounds", _by_round),
        (f"{figure}-by-bytes", f"{figure.capitalize()} against bytes", _by_bytes),
        (f"{figure}-by-seconds", f"{figure.capitalize()} against time", _by_seconds),
        ("front", f"Final {figure} against bytes", _front),
    ):
        if any(len(row.curve()) > 1 for row in comparison.rows):
            plots.append(_themed(drawn(name, title, partial(paint, comparison))))
            _write(comparison, name, title, partial(paint, comparison))
    return plots


def _themed(plot: Plot) -> Plot:
    svg = plot.themed
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    return Plot(plot.name, plot.title, plot.text, svg)


def _write(comparison: Comparison, name: str, title: str, paint: Callable[[Axes], str]) -> None:
    """The plot as files, with its title and a legend below."""
    shown = [row for row in comparison.rows if row.runs]

    def with_legend(axes: Axes) -> str:
        text = paint(axes)
        axes.set_title(title, loc="left", color=LIGHT["ink"], fontsize=12)
        known = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        labels = [row.row.label for row in shown if row.row.label in known]
        short = [shortened(label, _LONGEST_LABEL) for label in labels]
        figure = axes.get_figure()
        assert figure is not None
        figure.legend([known[label] for label in labels], short, loc="outside lower left", ncols=1, handlelength=3)
        return text

    def save(figure: Figure) -> None:
        path = comparison.out / "plots" / f"{name}.png"
        figure.set_layout_engine("none")  # it is laid out: savefig would draw everything once more to see
        build_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160, facecolor="white"))

    size = (1.3 * SIZE[0], 1.2 * SIZE[1] + 0.2 * len(shown))
    plot = drawn(name, title, with_legend, size, save)
    write_atomically(comparison.out / "plots" / f"{name}.svg", plot.svg)


def _by_round(comparison: Comparison, axes: Axes) -> str:
    _curves(comparison, axes, lambda point: point.round)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    figure, ends = comparison.grid.figure, _ends(comparison)
    return f"Held-out {figure} against rounds, with the mean and the range over the seeds: {ends}."


def _by_bytes(comparison: Comparison, axes: Axes) -> str:
    counts = _curves(comparison, axes, lambda point: point.bytes, logarithmic=True)
    if counts:
        bytes_axis(axes, min(counts), max(counts))
    axes.set_xlabel("bytes up and down, per sampled client")
    return (
        f"Held-out {comparison.grid.figure} against cumulative bytes per sampled client, logarithmic: "
        f"{_ends(comparison, lambda row: as_bytes(row.mean['bytes']))}."
    )


def _by_seconds(comparison: Comparison, axes: Axes) -> str:
    longest = max(point.seconds for row in comparison.rows for point in row.curve())
    scale, unit = (3600, "hours") if longest > 10_000 else (60, "minutes") if longest > 180 else (1, "seconds")
    _curves(comparison, axes, lambda point: point.seconds / scale)
    axes.set_xlabel(f"{unit} of rounds, without evaluation")
    return f"Held-out {comparison.grid.figure} against {unit} of rounds: {_ends(comparison)}."


def _front(comparison: Comparison, axes: Axes) -> str:
    """The final score and bytes of every row. The line joins the Pareto-optimal rows."""
    styled = styles(comparison)
    rows = [row for row in comparison.rows if row.runs and row.mean["bytes"] > 0]
    front = sorted((row.mean["bytes"], row.score) for row in rows if row.pareto_optimal)
    axes.plot(*zip(*front, strict=True), color=LIGHT["soft"], linewidth=1.6, drawstyle="steps-post", zorder=1)
    for row in rows:
        style, deviation = styled[row.row.label], row.deviation["score"]
        axes.errorbar(
            [row.mean["bytes"]],
            [row.score],
            yerr=None if math.isnan(deviation) else [deviation],
            fmt=style.mark,
            color=style.light,
            markersize=8 if row.pareto_optimal else 6,
            markerfacecolor=style.light if row.pareto_optimal else LIGHT["paper"],
            capsize=3,
            label=row.row.label,
            zorder=3,
        )
    if rows:
        bytes_axis(axes, min(row.mean["bytes"] for row in rows), max(row.mean["bytes"] for row in rows))
    axes.set_xlabel("bytes up and down, per sampled client")
    axes.set_ylabel(f"final {_axis(comparison)}")
    names = ", ".join(row.row.label for row in sorted(rows, key=lambda row: row.mean["bytes"]) if row.pareto_optimal)
    return (
        f"Final {comparison.grid.figure} against bytes. Pareto-optimal rows have filled marks and are joined: {names}."
    )


def _curves(comparison: Comparison, axes: Axes, x: Callable[[Point], float], logarithmic: bool = False) -> list[float]:
    """Draw every row's curve and return the points' horizontal coordinates."""
    styled, coordinates, scores = styles(comparison), [], []
    for row in comparison.rows:
        style = styled[row.row.label]
        points = [pair for pair in zip(row.curve(), row.band(), strict=True) if x(pair[0]) > 0 or not logarithmic]
        if not points:
            continue
        xs, mean = [x(point) for point, _ in points], [point.score for point, _ in points]
        low, high = zip(*(band for _, band in points), strict=True)
        mark = style.mark if len(points) <= 40 else ""
        if len(row.runs) > 1:
            axes.fill_between(xs, low, high, color=style.light, alpha=0.15, linewidth=0)
        axes.plot(
            xs,
            mean,
            linestyle=style.line,
            marker=mark,
            markersize=3.5,
            linewidth=2,
            color=style.light,
            label=row.row.label,
        )
        coordinates += xs
        scores += mean
    if scores:
        _fit(axes, comparison, scores)
    axes.set_ylabel(_axis(comparison))
    return coordinates


def _axis(comparison: Comparison) -> str:
    """What the vertical axis shows."""
    return "held-out loss (nats)" if comparison.grid.figure == "loss" else f"held-out {comparison.grid.figure}"


def _fit(axes: Axes, comparison: Comparison, scores: list[float]) -> None:
    """Cut off rows far worse than the untuned model, so that the differences between the others stay visible."""
    cost = comparison.grid.cost
    first = min((row.curve()[0].score for row in comparison.rows if row.runs and row.curve()), key=cost)
    best, worst = min(scores, key=cost), max(scores, key=cost)
    gain = cost(first) - cost(best)
    if gain > 0 and cost(worst) > cost(first) + 0.5 * gain:
        ends = (best + 0.08 * (best - first), first - 0.5 * (best - first))
        axes.set_ylim(min(ends), max(ends))


def _ends(comparison: Comparison, cost: Callable[[RowResult], str] = lambda row: "") -> str:
    return "; ".join(
        f"{row.row.label} ends at {as_loss(row.score)}{f' after {cost(row)}' if cost(row) else ''}"
        for row in comparison.rows
        if row.runs
    )
