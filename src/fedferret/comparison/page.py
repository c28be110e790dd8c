"""``comparison.html``: a comparison on one page. Like the report, the page is one file without a script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fedferret.comparison.plots import COLOURS, Style, draw, styles
from fedferret.comparison.results import Comparison, RowResult
from fedferret.comparison.table import PARETO_MARK, cells, headings, missing_runs, notes
from fedferret.core.files import write_atomically
from fedferret.core.text import shortened
from fedferret.tracking.plots import DARK, LIGHT
from fedferret.tracking.report import Figure, environment_of, templates
from fedferret.tracking.units import as_bytes, as_duration, as_loss, as_ratio

FILE = "comparison.html"


@dataclass(frozen=True)
class Link:
    """The report of a run, as a path relative to the page."""

    text: str
    path: str


def write_page(comparison: Comparison) -> Path:
    """Write ``comparison.html`` and the plots' files, and return the page's path.

    Args:
        comparison: of a grid.

    Returns:
        The path of ``comparison.html``.
    """
    rows, styled = comparison.rows, styles(comparison)
    runs = [run for row in rows for run in row.runs]
    local = [run for run in runs if run.imported_from is None]
    template = templates(Path(__file__).parent).get_template("comparison.html.jinja")
    page = template.render(
        title=_title(comparison),
        status=f"{comparison.over} of {len(comparison.grid.rows) * len(comparison.grid.seeds)} runs done",
        sentence=_sentence(comparison),
        figures=_figures(comparison),
        plots=[(plot.name, plot.title, plot.text, Markup(plot.svg)) for plot in draw(comparison)],  # safe: made here
        legend=[(row.row.label, swatch(styled[row.row.label]), row.pareto_optimal) for row in rows if row.runs],
        headings=headings(comparison),
        rows=[cells(comparison, row) for row in rows],
        notes=notes(comparison),
        remarks=comparison.remarks if runs else (),
        missing_runs=missing_runs(comparison),
        links=[(row.row.label, _links(comparison, row)) for row in rows if row.runs],
        grid=comparison.grid.to_toml(),
        environment=environment_of(local[0].cell.folder) if local else [],
        pareto_mark=PARETO_MARK,
        light={**LIGHT, **{name: light for name, (light, _) in COLOURS.items()}},
        dark={**DARK, **{name: dark for name, (_, dark) in COLOURS.items()}},
    )
    write_atomically(comparison.out / FILE, page)
    return comparison.out / FILE


def swatch(style: Style) -> Markup:
    """A piece of a row's line with the row's mark, as SVG.

    Args:
        style: of a row.

    Returns:
        An SVG element.
    """
    shapes = {
        "o": '<circle cx="18" cy="7" r="4"/>',
        "s": '<rect x="14" y="3" width="8" height="8"/>',
        "^": '<path d="M18 2 L22.5 11 L13.5 11 Z"/>',
    }
    dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
    return Markup(
        f'<svg viewBox="0 0 36 14" aria-hidden="true" style="color: var(--{style.colour})" fill="currentColor">'
        f'<path d="M1 7 H35" stroke="currentColor" stroke-width="2.5"{dash}/>{shapes[style.mark]}</svg>'
    )


def _title(comparison: Comparison) -> str:
    recipe = comparison.grid.rows[0].recipe
    return f"{len(comparison.grid.rows)} methods on {shortened(recipe.model.name, 100)}"


def _sentence(comparison: Comparison) -> str:
    recipe, seeds = comparison.grid.rows[0].recipe, comparison.grid.seeds
    rounds = sorted({row.recipe.rounds for row in comparison.grid.rows})
    length = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return (
        f"The same model, data, clients and batch order for all: {recipe.data_source}, {recipe.clients.per_round} "
        f"clients per round, {length} rounds, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    )


def _figures(comparison: Comparison) -> list[Figure]:
    """The figures at the head of the page: the best score, the fewest bytes and the least time to the target."""
    rows = [row for row in comparison.rows if row.runs]
    if not rows:
        return []
    grid = comparison.grid
    best = f"{'highest' if grid.higher_is_better else 'lowest'} {grid.figure}"
    figures = [Figure(best, as_loss(rows[0].score), rows[0].row.label)]
    for name, label, written in (
        ("bytes_to_target", "fewest bytes to the target", as_bytes),
        ("seconds_to_target", "least time to the target", as_duration),
    ):
        reached = sorted((row for row in rows if row.mean[name] == row.mean[name]), key=lambda row: row.mean[name])
        if reached:
            figures.append(Figure(label, written(reached[0].mean[name]), reached[0].row.label))
        if name == "bytes_to_target" and len(reached) > 1 and reached[0].mean[name]:
            ratio = as_ratio(reached[-1].mean[name] / reached[0].mean[name])
            figures.append(Figure("most bytes to the target", f"{ratio}× as many", reached[-1].row.label))
    if comparison.target is not None:
        figures.append(Figure(f"target {grid.figure}", as_loss(comparison.target)))
    return figures


def _links(comparison: Comparison, row: RowResult) -> list[Link]:
    return [
        Link(f"seed {run.cell.seed}", (run.cell.folder / "report.html").relative_to(comparison.out).as_posix())
        for run in row.runs
        if run.imported_from is None
    ]
