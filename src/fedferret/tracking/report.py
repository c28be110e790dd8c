"""``report.html``: a run on one page that opens from disk, without a network, on a phone or a desktop.

The page is one file with inline CSS, inline SVG and no script. A content security policy forbids it to load anything.
It is a jinja2 template (torch depends on jinja2, so jinja2 is installed), because jinja2 escapes all values from data.
It can be written at any time. For an unfinished run it shows the rounds so far.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedferret.core.errors import UserError
from fedferret.core.files import inside, read_intact, write_atomically
from fedferret.core.log import RESTORE
from fedferret.core.text import printable_lines, shortened
from fedferret.tracking import environment
from fedferret.tracking.events import FILE as FILE_OF_EVENTS
from fedferret.tracking.events import Evaluation, Run, read
from fedferret.tracking.figures import extra_metrics, headline
from fedferret.tracking.summary import read_summary, summarise
from fedferret.tracking.units import as_bytes, as_count, as_duration, as_loss, as_ratio

FILE = "report.html"


@dataclass(frozen=True)
class Figure:
    """One figure at the head of the page."""

    label: str
    value: str
    detail: str = ""  # a second line, such as FedAvg's value


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``plots/*.svg`` of the run in ``folder`` and return the report's path.

    Args:
        folder: of the run.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: if ``folder`` has no event log, a file of it is damaged, or a link leads out of it.
        RunError: if a file cannot be read.
    """
    # here, because other commands need not wait a second for matplotlib
    from fedferret.tracking.plots import DARK, LIGHT, draw

    run = read(folder)
    if not run.start:
        raise UserError(f"{folder / FILE_OF_EVENTS} has no start of a run, so there is nothing to report: {RESTORE}")
    summary = {**read_summary(folder), **summarise(run)}
    plots = draw(run)
    for plot in plots:
        write_atomically(inside(folder, folder / "plots") / f"{plot.name}.svg", plot.svg)
    template = templates().get_template("report.html.jinja")
    page = template.render(
        title=_title(run),
        sentence=_sentence(run),
        status=_status(run),
        figures=_figures(run, summary),
        plots=[(plot.name, plot.title, plot.text, Markup(plot.themed)) for plot in plots],  # safe: made here
        rounds=_rounds(run),
        sparse=_sparse(run),
        metric_names=_metric_names(run),
        metrics=_metrics(run),
        failures=[(number, f.client, f.stage, f.reason) for number, f in run.failures],
        bounded=[(number, client) for number, entry in sorted(run.rounds.items()) for client in entry.bounded],
        lists=[(str(each.round), ", ".join(each.added), ", ".join(each.retired)) for each in run.lists],
        rewinds=_rewinds(run),
        changed_data=[(str(each.round), each.what) for each in run.changed_data],
        notices=sorted(run.notices),
        clients=_clients(run),
        owners=_owners(run),
        primary=_last(run).primary if run.evaluations else "loss",
        owner_figures=_client_figures(_last(run)) if run.evaluations else [],
        notes=_notes(run),
        data_picture=Markup(_data_picture(folder)),  # safe: base 64
        recipe=_recipe(folder),
        environment=environment_of(folder),
        folder=shlex.quote(str(folder)),
        global_model=run.start.get("global_model", True),
        no_folder=run.start.get("no_folder", ""),
        light=LIGHT,
        dark=DARK,
    )
    write_atomically(folder / FILE, page)
    return folder / FILE


def templates(*folders: Path) -> Environment:
    """The report's templates and those in ``folders``. They escape every value.

    Args:
        folders: looked at before the report's own.

    Returns:
        An environment that refuses names which nobody gave.
    """
    return Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )


def _shown(value: Any) -> Any:
    """What a template shows of a value: names of any length and content are cut, and print."""
    return printable_lines(value, 1000) if isinstance(value, str) and not isinstance(value, Markup) else value


def _title(run: Run) -> str:
    return _capital(f"{run.start.get('method', 'a run')} on {_named(run, 'model', 'a model')}")


def _sentence(run: Run) -> str:
    start = run.start
    weights = f" ({as_count(start['parameters'])} weights)" if start.get("parameters") else ""
    clients = f", held by {start['clients']:,} clients" if start.get("clients") else ""
    seed = f"; seed {start['seed']}" if "seed" in start else ""
    unevaluated = " The run had no held-out examples, so nothing was evaluated." if start.get("held_out") == 0 else ""
    return _capital(
        f"{start.get('method', 'a method')} tuned {_named(run, 'model', 'a model')}{weights} on "
        f"{_named(run, 'data', 'data')}{clients}: {run.done} of {run.planned} rounds{seed}.{unevaluated}"
    )


def _named(run: Run, field: str, otherwise: str) -> str:
    """A name from the recipe, which may be a long path."""
    return shortened(str(run.start.get(field, otherwise)), 100)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _status(run: Run) -> str:
    when = f"{run.last[:10]} {run.last[11:16]} UTC"
    if run.status == "finished":
        return f"finished {when}"
    return f"{run.status} after round {run.done} of {run.planned}, last event {when}"


def _figures(run: Run, summary: dict[str, Any]) -> list[Figure]:
    """The figures at the head of the page: losses, bytes, time and memory."""
    figures = []
    if run.evaluations:
        first, last = run.evaluations[min(run.evaluations)], run.evaluations[max(run.evaluations)]
        perplexity = ""
        if first.perplexity is not None and last.perplexity is not None:
            perplexity = f"perplexity {first.perplexity:.4g} → {last.perplexity:.4g}"
        before_after = f"{as_loss(first.loss)} → {as_loss(last.loss)}"
        figures.append(Figure("held-out loss, untuned → tuned", before_after, perplexity))
        before, after = (headline(next(iter(evaluation.results.values()))) for evaluation in (first, last))
        figures += [
            Figure(f"{name}, untuned → tuned", f"{as_loss(before[name])} → {as_loss(value)}")
            for name, value in after.items()
            if name in before
        ]
        figures += [
            Figure(f"baseline: {name}", as_loss(baseline.loss), _against(last.loss, baseline.loss))
            for name, baseline in run.baselines.items()
        ]
        figures += [
            Figure(f"baseline: {name}, {figure}", as_loss(baseline.spread[figure]), "on what its clients hold out")
            for name, baseline in run.baselines.items()
            for figure in ("client-mean", "worst-tenth")
            if figure in baseline.spread
        ]
    ledger = run.ledger()
    if ledger.up:
        model = 4 * ledger.parameters
        per_client = ledger.up_per_client_round
        figures.append(Figure("up, per client and round", as_bytes(per_client), f"FedAvg: {as_bytes(model)}"))
        total = ledger.up + ledger.down
        fedavg = f"FedAvg: {as_bytes(ledger.fedavg)}, {as_ratio(ledger.fedavg / total)}× as much"
        figures.append(Figure("total up and down", as_bytes(total), fedavg))
    if ledger.evaluation:
        figures.append(Figure("evaluation at the clients", as_bytes(ledger.evaluation), "both ways, not in the total"))
    if ledger.discarded:
        figures.append(Figure("discarded by rewinding", as_bytes(ledger.discarded), "both ways, not in the total"))
    if summary["seconds"]:
        share = summary["seconds_overhead"] / summary["seconds"]
        figures.append(Figure("time", as_duration(summary["seconds"]), f"{share:.1%} overhead"))
    if "peak_memory_bytes" in summary:
        figures.append(Figure("peak memory", as_bytes(summary["peak_memory_bytes"]), "of the process"))
    return figures


def _against(loss: float, baseline: float) -> str:
    difference = baseline - loss
    if math.isnan(difference):
        return ""
    return f"this run is {abs(difference):.3f} {'better' if difference >= 0 else 'worse'}"


def _rounds(run: Run) -> list[tuple[str, ...]]:
    """The table of rounds. Round 0 is the model before tuning."""
    rows: list[tuple[str, ...]] = []
    sparse = _sparse(run)
    for number in sorted({*run.rounds, *run.evaluations}):
        entry, evaluation = run.rounds.get(number), run.evaluations.get(number)
        held_out = as_loss(evaluation.loss) if evaluation else ""
        if entry is None:
            rows.append((str(number), "", "", held_out, "", "", "", "", "", *([""] if sparse else [])))
            continue
        rows.append(
            (
                str(number),
                f"{len(entry.clients) - len(entry.failures)} of {len(entry.clients)}",
                as_loss(entry.loss),
                held_out,
                as_bytes(sum(entry.bytes_up.values())),
                as_bytes(sum(entry.bytes_down.values())),
                as_duration(entry.seconds),
                f"{entry.seconds_overhead / entry.seconds:.1%}" if entry.seconds else "",
                entry.fingerprint[:12],
                *([f"{fmean(entry.density.values()):.1%}" if entry.density else ""] if sparse else []),
            )
        )
    return rows


def _sparse(run: Run) -> bool:
    """Whether clients say which share of their weights is kept."""
    return any(entry.density for entry in run.rounds.values())


def _metric_names(run: Run) -> list[str]:
    """Every extra metric of any held-out set."""
    scores = (each for entry in run.evaluations.values() for each in entry.results.values())
    return list(dict.fromkeys(name for each in scores for name in extra_metrics(each)))


def _metrics(run: Run) -> list[tuple[str, ...]]:
    """A row for each evaluation and held-out set with an extra metric."""
    names = _metric_names(run)
    return [
        (
            str(number),
            held_out,
            as_loss(scores["loss"]),
            *(as_loss(scores[name]) if name in scores else "" for name in names),
        )
        for number, entry in sorted(run.evaluations.items())
        for held_out, scores in entry.results.items()
        if extra_metrics(scores)
    ]


def _owners(run: Run) -> list[tuple[str, ...]]:
    """Every client that scored: its primary figure before and after tuning, its other figures; the worst first."""
    if not run.evaluations:
        return []
    first, last = run.evaluations[min(run.evaluations)], _last(run)
    names, worst = _client_figures(last), -1 if last.primary == "loss" else 1
    return [
        (
            client,
            as_loss(first.per_client[client]) if client in first.per_client else "",
            as_loss(figure),
            *(as_loss(last.clients[client][name]) for name in names),
        )
        for client, figure in sorted(last.per_client.items(), key=lambda pair: worst * pair[1])
    ]


def _last(run: Run) -> Evaluation:
    return run.evaluations[max(run.evaluations)]


def _notes(run: Run) -> list[str]:
    """How the data were read, as the run said when it began."""
    notes = run.start.get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _data_picture(folder: Path) -> str:
    """The plot of who holds what, in base 64: as an image it can run nothing; "" where there is none."""
    path = folder / "plots" / "data.svg"
    if not path.exists():
        return ""
    return base64.b64encode(read_intact(inside(folder, path), "remove it; the report leaves it out")).decode()


def _client_figures(evaluation: Evaluation) -> list[str]:
    """The figures of clients beside the primary one."""
    some = next(iter(evaluation.clients.values()), {})
    return [name for name in some if name not in (evaluation.primary, "perplexity", "tokens")]


def _rewinds(run: Run) -> list[tuple[str, ...]]:
    """A row for each time that the run was rewound."""
    return [
        (
            str(each.round),
            f"{each.discarded[0]} to {each.discarded[-1]}" if each.discarded else "none",
            as_bytes(each.bytes),
            ", ".join(each.retired),
            ", ".join(each.begun_anew),
        )
        for each in run.rewinds
    ]


def _clients(run: Run) -> list[tuple[str, int, int, str, str]]:
    """Every sampled client: id, times sampled, failures, bytes up, loss of the local-only baseline."""
    local_only = run.baselines["local-only"].per_client if "local-only" in run.baselines else {}
    sampled: dict[str, list[int]] = {}
    for _, entry in sorted(run.rounds.items()):
        for client in entry.clients:
            counts = sampled.setdefault(client, [0, 0, 0])
            counts[0] += 1
            counts[2] += entry.bytes_up.get(client, 0)
        for failure in entry.failures:
            sampled[failure.client][1] += 1
    return [
        (client, times, failed, as_bytes(sent), as_loss(local_only[client]) if client in local_only else "")
        for client, (times, failed, sent) in sampled.items()
    ]


def environment_of(folder: Path) -> list[tuple[str, str]]:
    """The machine and versions of the run in ``folder``: names and values as text.

    Args:
        folder: of the run.

    Returns:
        Pairs in the file's order; empty if the file does not exist.
    """
    path = folder / environment.FILE
    if not path.exists():
        return []
    remedy = "remove it; the report leaves the machine out"
    content = read_intact(inside(folder, path), remedy)
    try:
        found = dict(json.loads(content))
        packages = dict(found.pop("packages", {}))
        found["memory"] = as_bytes(found.pop("memory_bytes", 0))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    return [(str(name), str(value)) for name, value in {**found, **packages}.items()]


def _recipe(folder: Path) -> str:
    path = folder / "recipe.toml"
    return read_intact(inside(folder, path), RESTORE).decode(errors="replace") if path.exists() else ""
