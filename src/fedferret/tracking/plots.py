"""The report's plots: each a function from a run to a matplotlib figure, drawn without pyplot or global settings.

The figures become small SVGs that scale from a phone to a poster. Text stays text. The same data give the same bytes
(fixed hash salt, no date). Ids contain the plot's name, so that several plots can share a page.
In the page a CSS variable replaces every colour, so the plots follow the reader's light or dark theme.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedferret.core.text import printable_lines, shortened
from fedferret.tracking.events import Run
from fedferret.tracking.summary import times
from fedferret.tracking.units import as_bytes, as_duration, as_loss

# each value occurs once: the page replaces the light value by a variable of that name
LIGHT = {
    "ink": "#1d2733",
    "quiet": "#5b6876",
    "line": "#d9dfe5",
    "paper": "#fefefe",
    "main": "#0b6e99",
    "second": "#c2570c",
    "third": "#5e4fa8",
    "fourth": "#3c7d3f",
    "alarm": "#c62336",
    "soft": "#9fb4c4",
}
DARK = {
    "ink": "#e8edf2",
    "quiet": "#9fadba",
    "line": "#33414e",
    "paper": "#18212a",
    "main": "#54b8e6",
    "second": "#f59a56",
    "third": "#ad9ff0",
    "fourth": "#7cc47f",
    "alarm": "#ff6b7a",
    "soft": "#587085",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["quiet"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["quiet"],
    "ytick.labelcolor": LIGHT["quiet"],
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10,
}
SIZE = (4.4, 3.5)  # inches; a point is about a pixel on a phone, so that text is readable there
_LONGEST_LABEL = 22
_MOST_ROWS, _MOST_COLUMNS = 100, 100  # cells of the map of sampled clients


@dataclass(frozen=True)
class Plot:
    """One plot, drawn. ``text`` describes it for readers who cannot see it."""

    name: str
    title: str
    text: str
    svg: str

    @property
    def themed(self) -> str:
        """The SVG to inline, with colours as CSS variables."""
        svg = self.svg
        for name, colour in LIGHT.items():
            svg = svg.replace(colour, f"var(--{name})")
        return svg


def draw(run: Run) -> list[Plot]:
    """Every plot for which ``run`` has data, in the order of the report.

    Args:
        run: as its event log has it.

    Returns:
        The plots, drawn.
    """
    plots = []
    for name, title, needs, paint in (
        ("loss-by-round", "Loss against rounds", bool(run.evaluations), _loss_by_round),
        ("score-by-round", "Scores against rounds", _primary(run) != "loss", _score_by_round),
        ("loss-by-bytes", "Loss against bytes", bool(_loss_after_bytes(run)), _loss_by_bytes),
        ("sampled", "Sampled clients", bool(run.rounds), _sampled),
        ("time", "Time per round", bool(run.rounds), _time),
    ):
        if needs:
            plots.append(drawn(name, title, partial(paint, run)))
    return plots


def drawn(
    name: str,
    title: str,
    paint: Callable[[Axes], str],
    size: tuple[float, float] = SIZE,
    save: Callable[[Figure], object] = lambda figure: None,
) -> Plot:
    """One plot in the report's style.

    Args:
        name: the id in the page and the file's name.
        title: the heading.
        paint: fills the axes and returns a description of the plot.
        size: width and height, inches.
        save: may write the figure in other formats.

    Returns:
        The plot, with the description that ``paint`` returned.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        canvas = FigureCanvasSVG(figure)
        text = paint(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has the font
            canvas.print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]  # savefig draws twice
            save(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(printable_lines(text, 1000))}"', 1)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'\sd="[^"]*"', lambda path: _rounded(path[0]), svg)
    return Plot(name, title, text, svg)


def _rounded(path: str) -> str:
    """Round path coordinates to a hundredth of a point: a third of the bytes, no visible difference."""
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path)


def _loss_by_round(run: Run, axes: Axes) -> str:
    evaluations = [run.evaluations[number] for number in sorted(run.evaluations)]
    names = list(dict.fromkeys(name for entry in evaluations for name in entry.results))
    if run.rounds:
        rounds = sorted(run.rounds)
        losses = [run.rounds[number].loss for number in rounds]
        axes.plot(rounds, losses, "o", markersize=3.5, color=LIGHT["soft"], label="training")
    for name, colour in zip(names, ("main", "third", "fourth", "quiet"), strict=False):
        points = [(e.round, e.results[name]["loss"]) for e in evaluations if name in e.results]
        _curve(axes, points, colour, name, main=name == names[0])
    _baselines(run, axes)
    axes.set_xlabel("round")
    axes.set_ylabel(_loss_label(run))
    axes.set_xlim(-0.02 * max(1, run.planned), max(1, run.planned) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    _legend(axes)
    first, last = evaluations[0], evaluations[-1]
    return (
        f"Held-out loss against rounds: {as_loss(first.loss)} after round {first.round}, "
        f"{as_loss(last.loss)} after round {last.round}."
    )


def _primary(run: Run) -> str:
    """The figure by which clients are compared."""
    return run.evaluations[max(run.evaluations)].primary if run.evaluations else "loss"


def _loss_label(run: Run) -> str:
    """The loss with its unit, where the unit is known."""
    scores = next(iter(run.evaluations[max(run.evaluations)].results.values())) if run.evaluations else {}
    targets = "example" if "accuracy" in scores else "token" if "perplexity" in scores or not scores else None
    return f"loss (nats per {targets})" if targets else "loss"


def _score_by_round(run: Run, axes: Axes) -> str:
    """The primary figure of the main set, of the clients' mean, and of their worst tenth."""
    primary, evaluations = _primary(run), [entry for _, entry in sorted(run.evaluations.items())]
    said = []
    for name, label, colour in (
        (primary, "main set", "main"),
        ("client-mean", "clients, mean", "third"),
        ("worst-tenth", "clients, worst tenth", "second"),
    ):
        scores = [(entry.round, next(iter(entry.results.values())).get(name)) for entry in evaluations]
        points = [(float(number), value) for number, value in scores if value is not None and math.isfinite(value)]
        if points:
            _curve(axes, points, colour, label, main=name == primary)
            said.append(f"{label} {as_loss(points[-1][1])}")
    axes.set_xlabel("round")
    axes.set_ylabel(primary)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    _legend(axes)
    return f"{primary.capitalize()} after the last evaluated round: {', '.join(said)}."


def _loss_after_bytes(run: Run) -> list[tuple[int, float]]:
    """(cumulative bytes, main held-out loss) after every evaluated round with a count above 0."""
    ledger = run.ledger()
    cumulative = np.cumsum([up + down for up, down in zip(ledger.up_by_round, ledger.down_by_round, strict=True)])
    total = dict(zip(sorted(run.rounds), cumulative.tolist(), strict=True))
    points = [(total[number], entry.loss) for number, entry in sorted(run.evaluations.items()) if number in total]
    return [(count, loss) for count, loss in points if count]


def _loss_by_bytes(run: Run, axes: Axes) -> str:
    points = _loss_after_bytes(run)
    _curve(axes, points, "main", run.start.get("method", "this run"))
    fedavg = run.ledger().fedavg_by_round[0]
    if fedavg:
        axes.axvline(fedavg, color=LIGHT["alarm"], linewidth=1.4, linestyle=(0, (4, 3)), label="one round of FedAvg")
    _baselines(run, axes)
    bytes_axis(axes, min(points[0][0], fedavg or math.inf), max(points[-1][0], fedavg))
    axes.set_xlabel("bytes up and down, all clients")
    axes.set_ylabel(_loss_label(run))
    _legend(axes)
    count, loss = points[-1]
    reference = f"; one round of FedAvg takes {as_bytes(fedavg)}" if fedavg else ""
    return f"Held-out loss against bytes, logarithmic: {as_loss(loss)} after {as_bytes(count)}{reference}."


def bytes_axis(axes: Axes, low: float, high: float) -> None:
    """Make the horizontal axis a logarithmic one of bytes.

    Args:
        axes: to change.
        low: the smallest value to show, bytes.
        high: the largest value to show, bytes.
    """
    axes.set_xscale("log")
    axes.set_xlim(low / 2, high * 2)
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: re.sub(r"\.0+ ", " ", as_bytes(count))))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _sampled(run: Run, axes: Axes) -> str:
    """A map of clients by rounds, clients in the order of their first round. In a large run a cell is several."""
    seen = {client: row for row, client in enumerate(first_seen(run))}
    per_row, per_column = math.ceil(len(seen) / _MOST_ROWS), math.ceil(run.done / _MOST_COLUMNS)
    shape = (math.ceil(len(seen) / per_row), math.ceil(run.done / per_column))
    sampled, failed = np.zeros(shape), np.zeros(shape)
    for number, entry in run.rounds.items():
        column = (number - 1) // per_column
        for client in entry.clients:
            sampled[seen[client] // per_row, column] += 1
        for failure in entry.failures:
            failed[seen[failure.client] // per_row, column] += 1
    share = sampled / sampled.max()
    cell = (per_column, per_row)
    for low, high, opacity in ((0, 1 / 3, 0.4), (1 / 3, 2 / 3, 0.7), (2 / 3, 1, 1.0)):
        _cells(axes, (share > low) & (share <= high) & (failed == 0), cell, "main", opacity)
    _cells(axes, failed > 0, cell, "alarm", 1.0)
    axes.grid(False)
    axes.set_xlim(0.5, shape[1] * per_column + 0.5)
    axes.set_ylim(shape[0] * per_row + 0.5, 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel("round" if per_column == 1 else f"round ({per_column} per cell)")
    axes.set_ylabel("clients, by first round" if per_row == 1 else f"clients, {per_row} per cell")
    for colour, label in (("main", "replied"), ("alarm", "failed")):
        axes.plot([], [], "s", color=LIGHT[colour], label=label)
    _legend(axes)
    of = f" of {run.start['clients']:,}" if "clients" in run.start else ""
    return f"Clients sampled in each round: {len(seen):,}{of} clients so far; failures: {len(run.failures):,}."


def first_seen(run: Run) -> list[str]:
    """Every sampled client, in the order of their first rounds.

    Args:
        run: as its event log has it.

    Returns:
        Names, each once.
    """
    return list(dict.fromkeys(client for number in sorted(run.rounds) for client in run.rounds[number].clients))


def _cells(axes: Axes, where: npt.NDArray[np.bool_], cell: tuple[int, int], colour: str, opacity: float) -> None:
    """Fill the cells of a map in one path: with gaps between few cells, with neighbours joined among many."""
    few = where.size < 1500
    steps = np.diff(np.pad(where.astype(int), ((0, 0), (1, 1))), axis=1)
    (rows, begins), (_, ends) = np.nonzero(steps == 1), np.nonzero(steps == -1)
    if few:
        rows, begins = np.nonzero(where)
        ends = begins + 1
    if not len(rows):
        return
    gap = 0.08 if few else 0.0
    left, right = 0.5 + (begins + gap) * cell[0], 0.5 + (ends - gap) * cell[0]
    top, bottom = 0.5 + (rows + gap) * cell[1], 0.5 + (rows + 1 - gap) * cell[1]
    corners = np.stack([left, top, right, top, right, bottom, left, bottom, left, top], axis=1).reshape(-1, 2)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(rows)
    axes.add_patch(PathPatch(Path(corners, codes), facecolor=LIGHT[colour], edgecolor="none", alpha=opacity))


def _time(run: Run, axes: Axes) -> str:
    rounds = list(range(1, run.done + 1))
    parts: dict[str, tuple[str, list[float]]] = {
        "clients' training": ("main", [run.rounds[n].seconds_local if n in run.rounds else 0.0 for n in rounds]),
        "evaluation": ("soft", [run.evaluations[n].seconds if n in run.evaluations else 0.0 for n in rounds]),
        "everything else": ("second", [run.rounds[n].seconds_overhead if n in run.rounds else 0.0 for n in rounds]),
    }
    scale, unit = (60.0, "minutes") if max(entry.seconds for entry in run.rounds.values()) > 180 else (1.0, "seconds")
    edges = np.arange(0.5, run.done + 1)
    below = np.zeros(run.done)
    for label, (colour, seconds) in parts.items():
        above = below + np.asarray(seconds) / scale
        axes.stairs(above, edges, baseline=below, fill=True, color=LIGHT[colour], linewidth=0, label=label)
        below = above
    axes.set_xlim(0.5, run.done + 0.5)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.set_ylabel(f"{unit} per round")
    _legend(axes)
    spent = times(run)
    return (
        f"Time per round by purpose. Totals: clients' training {as_duration(spent['seconds_local'])}, "
        f"evaluation {as_duration(spent['seconds_evaluation'])}, the rest {as_duration(spent['seconds_overhead'])}."
    )


def _curve(axes: Axes, points: Sequence[tuple[float, float]], colour: str, label: str, main: bool = True) -> None:
    """A line, with a dot at every point if there are at most 60."""
    style = "-o" if len(points) <= 60 else "-"
    width, above = (2.4, 3) if main else (1.4, 2)
    axes.plot(
        *zip(*points, strict=True), style, markersize=4, linewidth=width, color=LIGHT[colour], label=label, zorder=above
    )


def _baselines(run: Run, axes: Axes) -> None:
    lines = [(name, baseline.loss) for name, baseline in run.baselines.items()]
    if 0 in run.evaluations:
        lines.insert(0, ("untuned", run.evaluations[0].loss))
    dashes: Sequence[tuple[int, tuple[float, ...]]] = ((0, (1, 2)), (0, (6, 2)), (0, (6, 2, 1, 2)))
    for index, (name, loss) in enumerate(lines):
        if math.isfinite(loss):
            colour = LIGHT["quiet" if name == "untuned" else "second"]
            axes.axhline(loss, color=colour, linewidth=1.5, linestyle=dashes[index % len(dashes)], label=name)


def _legend(axes: Axes) -> None:
    """A legend above the plot, where it covers no data. Long names are cut, because they would shrink the plot."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [shortened(label, _LONGEST_LABEL) for label in labels]
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, handlelength=1.6, columnspacing=1.2
    )
