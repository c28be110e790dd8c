"""Write measured figures between README's markers: those of a run, with plots in docs/images, and of the benchmarks.

python docs/update_readme.py [RUN_FOLDER]        runs/demo by default
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fedferret.core.files import write_atomically
from fedferret.tracking.events import read
from fedferret.tracking.summary import read_summary
from fedferret.tracking.units import as_bytes, as_count, as_duration

PLOTS = {"loss-by-round": "Loss on held-out text against rounds", "loss-by-bytes": "The same loss against bytes moved"}


def section(summary: dict[str, Any], parameters: int, delta_bytes: int | None) -> str:
    """The Markdown between the markers.

    Args:
        summary: the content of summary.json.
        parameters: of the model.
        delta_bytes: the size of the exported delta file, None without one.
    """
    losses, baselines = summary["eval_loss"], summary["baselines"]
    fedavg = 4 * parameters
    losses_by_model = [
        ("before tuning", losses[0]),
        *([("local-only baseline", baselines["local-only"])] if "local-only" in baselines else []),
        (f"{summary['method']}, {summary['rounds']} rounds", losses[-1]),
    ]
    delta = [] if delta_bytes is None else [("the tuned model, without its base", delta_bytes, fedavg)]
    moved = [
        ("up, per client and round", summary["bytes_up_per_client_round"], fedavg),
        ("down, per client and round", summary["bytes_down_per_client_round"], fedavg),
        ("both ways, the whole run", summary["bytes_up"] + summary["bytes_down"], summary["bytes_fedavg"]),
        *delta,
    ]
    lines = [
        f"{summary['model']}, all {as_count(parameters)} weights; {as_duration(summary['seconds'])} of training and "
        f"evaluation, {as_bytes(summary['peak_memory_bytes'])} of memory at most.",
        "",
        "| loss on held-out text, nats per token | |",
        "|---|---|",
        *(f"| {name} | {loss:.3f} |" for name, loss in losses_by_model),
        "",
        f"| bytes moved | {summary['method']} | FedAvg |",
        "|---|---|---|",
        *(f"| {name} | {as_bytes(ours)} | {as_bytes(theirs)} |" for name, ours, theirs in moved),
        "",
        *(f"![{text}](docs/images/{name}.svg)" for name, text in PLOTS.items()),
    ]
    return "\n".join(lines)


def on_paper(svg: str) -> str:
    """The plot on white, so that its dark text is readable in a dark theme too."""
    return svg.replace("<svg", '<svg style="background: #fff"', 1)


def update(run: Path, readme: Path) -> None:
    """Rewrite the marked part of ``readme`` and the images in docs/images.

    Args:
        run: folder of a finished run.
        readme: README.md, in the same folder as docs.
    """
    summary = read_summary(run)
    if not summary or summary["status"] != "finished":
        sys.exit(f"{run} holds no finished run: make demo first")
    delta = run / "tuned.fedferret"
    text = section(summary, read(run).start["parameters"], delta.stat().st_size if delta.exists() else None)
    for name in PLOTS:
        write_atomically(
            readme.parent / "docs" / "images" / f"{name}.svg", on_paper((run / "plots" / f"{name}.svg").read_text())
        )
    replace_between(readme, "demo", text)


def performance(results: Path) -> str:
    """The Markdown of every benchmark result in ``results``: a row per figure."""
    lines = ["| measured | ratio: median (least to most) | aim |", "|---|---|---|"]
    machines = set()
    for path in sorted(results.glob("*.json")):
        description = json.loads(path.read_text())
        machine = description["machine"]
        machines.add(f"{machine['processor']}, {machine['cores']} cores")
        for figure in description["figures"]:
            ratio = figure["ratio"]
            median, least, most = (_plain(ratio[name]) for name in ("median", "min", "max"))
            spread = f"{median} ({least} to {most})"
            missed = "" if figure["reached"] else ", missed"
            lines.append(f"| {figure['claim']} | {spread} | {figure['target']}{missed} |")
    return "\n".join([*lines, "", f"On {'; '.join(sorted(machines))}; sizes and notes in benchmarks/results/."])


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def replace_between(readme: Path, marker: str, text: str) -> None:
    """Replace the text between the comments ``marker:begin`` and ``marker:end``.

    Args:
        readme: the file to change.
        marker: of the comments.
        text: the new text.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, _, rest = readme.read_text().partition(begin)
    _, _, after = rest.partition(end)
    write_atomically(readme, f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    replace_between(here / "README.md", "performance", performance(here / "benchmarks" / "results"))
    update(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "runs" / "demo", here / "README.md")
