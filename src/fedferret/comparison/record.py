"""``fedferret record``: check runs against the rules of docs/records.md, and print the line of a record."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedferret.comparison.records import (
    TRACKS,
    RecordRun,
    Rule,
    control_of,
    folders_of,
    nearest_track,
    p_value,
    read_tracks,
    rules_of,
    without_rate,
)
from fedferret.config import build_algorithm
from fedferret.core.errors import UserError
from fedferret.core.text import plain_line
from fedferret.settings import table_of
from fedferret.tracking.units import as_bytes, as_loss


def record(
    contenders: Sequence[Path],
    controls: Sequence[Path],
    log: Callable[[str], None],
    tracks: Path | None = None,
    who: str = "",
    commit: str = "",
    link: str = "",
) -> bool:
    """Check runs against every rule, and print what was found.

    Args:
        contenders: run folders of one method, or folders with runs named ``seed-N``.
        controls: those of FedAvg, at its best rate and at a lower and a higher one.
        log: called with lines.
        tracks: a file of tracks; the package's by default.
        who: names the record's holder in the table's line.
        commit: of the repository that has the runs.
        link: where the runs are described.

    Returns:
        Whether the runs are a record's.

    Raises:
        UserError, RunError: a folder is no run's, or cannot be read.
    """
    if not controls:
        raise UserError("no run of FedAvg was given: add --control FOLDER, once or several times")
    known = read_tracks(tracks or TRACKS)
    runs, others = ([RecordRun.of(folder) for folder in folders_of(given)] for given in (contenders, controls))
    twice = {run.folder.resolve() for run in runs} & {run.folder.resolve() for run in others}
    if twice:
        raise UserError(f"{min(twice)} is given on both sides: give a run once")
    name = nearest_track([*runs, *others], known)
    title, facts = known[name]
    rules, shares = rules_of(runs, others, facts)
    log(f"Track: {name} ({title}), {facts['rounds']} rounds")
    for rule in rules:
        log(f"{'pass' if rule.passed else 'FAIL'}  {rule.name}: {rule.found} (allowed: {rule.allowed})")
    control = {run.recipe.seed: run for run in control_of(others)}
    for run in sorted(runs, key=lambda each: each.recipe.seed):
        if run.recipe.seed in shares:
            other = control[run.recipe.seed]
            losses = f"{as_loss(other.start)}, FedAvg {as_loss(other.loss)}, contender {as_loss(run.loss)}"
            log(f"seed {run.recipe.seed}: {losses}: {shares[run.recipe.seed]:.2%}")
    if len(shares) == 3:
        p = p_value(list(shares.values()))
        log(f"One-sided t test of three shares against 97%: p = {p:.3f}; a record shows p < 0.01 or its seeds")
    passed = all(rule.passed for rule in rules)
    log(line_of(name, runs, shares, who, commit, link) if passed else f"No record: {_missed(rules)}")
    return passed


def line_of(
    track: str, runs: Sequence[RecordRun], shares: Mapping[int, float], who: str, commit: str, link: str
) -> str:
    """The line of docs/records.md.

    Args:
        track: of the record.
        runs: of the contender.
        shares: by seed.
        who: names the holder.
        commit: of the runs.
        link: to their description.

    Returns:
        A row of a Markdown table.
    """
    ledgers = [run.run.ledger() for run in runs]
    up = statistics.fmean(ledger.up_per_client_round for ledger in ledgers)
    total = statistics.fmean(ledger.up + ledger.down for ledger in ledgers)
    seeds = ", ".join(f"{share:.1%}" for _, share in sorted(shares.items()))
    mean = f"{statistics.fmean(shares.values()):.1%} ({seeds})"
    cells = [track, f"{up:,.0f}", as_bytes(total), mean, who or "?", how(runs[0]), commit or "?", link or "?"]
    return "| " + " | ".join(plain_line(cell).replace("|", "\\|") for cell in cells) + " |"


def how(run: RecordRun) -> str:
    """The method and the settings in which it differs from its defaults; of the training only the rate.

    Args:
        run: of the contender.
    """
    method = run.recipe.algorithm
    usual, given = (table_of(each) for each in (build_algorithm(method.name, {}), method))
    changed = [f"{name} = {value}" for name, value in _changed(usual, given) if not name.startswith("training.")]
    return ", ".join(
        [method.name, *changed, f"rate {run.rate:g}"] if without_rate(run.training) else [method.name, *changed]
    )


def _changed(usual: Mapping[str, Any], given: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in given.items():
        if isinstance(value, Mapping):
            below = usual.get(name)
            found += _changed(below if isinstance(below, Mapping) else {}, value, f"{where}{name}.")
        elif usual.get(name) != value:
            found.append((f"{where}{name}", value))
    return found


def _missed(rules: Sequence[Rule]) -> str:
    return ", ".join(rule.name for rule in rules if not rule.passed)
