"""``summary.json``: the metrics of a run in one small file, rewritten whole after every round.

Times exclude interruptions: seconds = Σ rounds + Σ evaluations, and
seconds_overhead = seconds − seconds_local − seconds_evaluation, never below 0. Baselines are not counted.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedferret.core.errors import UserError
from fedferret.core.files import inside, read_intact, write_atomically
from fedferret.tracking import events
from fedferret.tracking.events import Evaluation, Run, read
from fedferret.tracking.figures import extra_metrics

FILE = "summary.json"


def summarise(run: Run) -> dict[str, Any]:
    """The figures of a run.

    Args:
        run: as its event log has it.

    Returns:
        Losses in nats per token (None if not finite), counts in bytes, times in seconds, by the names of the file.
    """
    ledger = run.ledger()
    rounds = [entry for _, entry in sorted(run.rounds.items())]
    evaluations = [entry for _, entry in sorted(run.evaluations.items())]
    sets = dict.fromkeys(name for entry in evaluations for name in entry.results)
    baselines = {name: _plain(baseline.loss) for name, baseline in run.baselines.items()}
    if 0 in run.evaluations:
        baselines = {"untuned": _plain(run.evaluations[0].loss), **baselines}
    return {
        "method": run.start.get("method", ""),
        "model": run.start.get("model", ""),
        "status": run.status,
        "rounds": run.done,
        "rounds_planned": run.planned,
        "failures": len(run.failures),
        "eval_rounds": [entry.round for entry in evaluations],
        "eval_loss": [_plain(entry.loss) for entry in evaluations],
        "eval": {
            name: [_plain(entry.results[name]["loss"]) if name in entry.results else None for entry in evaluations]
            for name in sets
        },
        "metrics": _metrics(evaluations, list(sets)),
        "baselines": baselines,
        "baselines_by_client": {
            name: {figure: _plain(value) for figure, value in baseline.spread.items()}
            for name, baseline in run.baselines.items()
            if baseline.spread
        },
        "train_loss_by_round": [_plain(entry.loss) for entry in rounds],
        # of sparse models: the mean over a round's clients
        **(
            {"density_by_round": [_mean(entry.density) for entry in rounds]}
            if any(each.density for each in rounds)
            else {}
        ),
        "bytes_up": ledger.up,
        "bytes_down": ledger.down,
        "bytes_fedavg": ledger.fedavg,
        "bytes_evaluation": ledger.evaluation,
        "bytes_discarded": ledger.discarded,
        "rewinds": len(run.rewinds),
        "bytes_up_per_client_round": ledger.up_per_client_round,
        "bytes_down_per_client_round": ledger.down_per_client_round,
        "bytes_up_by_round": ledger.up_by_round,
        "bytes_down_by_round": ledger.down_by_round,
        "bytes_fedavg_by_round": ledger.fedavg_by_round,
        **times(run),
    }


def _metrics(evaluations: Sequence[Evaluation], sets: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
    """The extra metrics of each held-out set, by evaluated round; None where a metric was not computed."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for name in sets:
        scores = [extra_metrics(entry.results.get(name, {})) for entry in evaluations]
        metrics = dict.fromkeys(metric for each in scores for metric in each)
        if metrics:
            found[name] = {
                metric: [_plain(each[metric]) if metric in each else None for each in scores] for metric in metrics
            }
    return found


def _mean(values: Mapping[str, float]) -> float | None:
    return _plain(fmean(values.values())) if values else None


def times(run: Run) -> dict[str, float]:
    """Where a run's time went.

    Args:
        run: as its event log has it.

    Returns:
        Seconds in all, and of training, evaluation and overhead; clients that train in parallel may have more.
    """
    evaluation = sum(entry.seconds for entry in run.evaluations.values())
    local = sum(entry.seconds_local for entry in run.rounds.values())
    total = sum(entry.seconds for entry in run.rounds.values()) + evaluation
    return {
        "seconds": total,
        "seconds_local": local,
        "seconds_evaluation": evaluation,
        "seconds_overhead": max(0.0, total - local - evaluation),
    }


def write_summary(folder: Path) -> dict[str, Any]:
    """Bring ``summary.json`` up to date from the event log, with the peak memory of this process.

    The peak memory of a resumed run is the maximum over its processes.

    Args:
        folder: of the run.

    Returns:
        The file's content.

    Raises:
        UserError: if ``folder`` has no event log, the log has another format, or a line is damaged.
    """
    before = read_summary(folder).get("peak_memory_bytes", 0)
    peak = max(before, peak_memory_bytes()) if isinstance(before, int) else peak_memory_bytes()
    summary = {**summarise(read(folder)), "peak_memory_bytes": peak}
    write_atomically(folder / FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def read_summary(folder: Path) -> dict[str, Any]:
    """Read ``summary.json`` as it was last written.

    Args:
        folder: of the run.

    Returns:
        The file's content; empty if the file does not exist.

    Raises:
        UserError: if the file is damaged.
        RunError: if it cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    remedy = "remove it; the event log has all its figures"
    try:
        return dict(json.loads(read_intact(inside(folder, path), remedy)))
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None


def is_finished(folder: Path) -> bool:
    """Whether the event log says that a run is finished.

    Args:
        folder: of the run.

    Returns:
        False where there is no event log.

    Raises:
        UserError, RunError: as ``events.read``.
    """
    return (folder / events.FILE).exists() and read(folder).status == "finished"


def peak_memory_bytes() -> int:
    """The most memory that this process had so far.

    Returns:
        The largest resident set, in bytes.
    """
    import resource  # does not exist on Windows; only this value would be missing there

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _plain(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
