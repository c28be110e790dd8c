"""The rules of docs/records.md, checked on run folders, and the line of a set of runs that passes.

    a track      the tables of a recipe that all runs share, by name in ``records.toml``
    contender    one method with one setting, seeds 1 to 3
    control      FedAvg, seeds 1 to 3, with the same training at its best rate; a lower and a higher rate prove it
    share_s      (L_0 − L_R of the contender) / (L_0 − L_R of the control), seed s, with L_0 of the control
    record       the mean of the shares is at least 97%

Runs of FedAvg are grouped by their rate. The control is the group with all seeds and the lowest mean loss. Every rule
says what was found and what is allowed. A run that misses a rule stops no other rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedferret.begun import begun_recipe
from fedferret.comparison.comparability import task_of
from fedferret.config import Recipe, build_algorithm, from_tables, merged
from fedferret.core.errors import UserError
from fedferret.recipe_file import read_toml
from fedferret.run_folder import difference
from fedferret.settings import table_of
from fedferret.tracking.events import Run, read

TRACKS = Path(__file__).with_name("records.toml")
SEEDS = (1, 2, 3)
SHARE = 0.97  # of FedAvg's loss reduction
FACTORS = (1.5, 4.0)  # between the control's rate and a rate that proves it the best
FEDAVG = {"name": "fedavg", **table_of(build_algorithm("fedavg", {}))}
_TASK = ("rounds", "model", "data", "objective", "text", "clients", "pool")


class Rule(NamedTuple):
    """A rule, whether the runs keep it, and why."""

    name: str
    passed: bool
    found: str
    allowed: str


@dataclass(frozen=True)
class RecordRun:
    """A run folder."""

    folder: Path
    recipe: Recipe
    run: Run

    @classmethod
    def of(cls, folder: Path) -> RecordRun:
        """Read a run folder.

        Args:
            folder: of the run.

        Raises:
            UserError, RunError: it is no run's, or cannot be read.
        """
        return cls(folder, begun_recipe(folder), read(folder))

    @property
    def training(self) -> dict[str, Any]:
        """The local training; empty where the method has another kind."""
        training = getattr(self.recipe.algorithm, "training", None)
        return {} if training is None else table_of(training)

    @property
    def rate(self) -> float:
        """The local learning rate; NaN where there is none."""
        return float(self.training.get("learning_rate", math.nan))

    @property
    def start(self) -> float:
        """The held-out loss before round 1; NaN if it was not measured."""
        return self.run.evaluations[0].loss if 0 in self.run.evaluations else math.nan

    @property
    def loss(self) -> float:
        """The held-out loss after the last round; NaN if it was not measured."""
        last = self.run.evaluations.get(self.recipe.rounds)
        return last.loss if last and self.run.status == "finished" else math.nan

    @property
    def diverged(self) -> bool:
        """Whether the loss after some round, the last evaluated, was above its start or not a number."""
        after = max(self.run.evaluations, default=0)
        return after > 0 and math.isfinite(self.start) and not self.run.evaluations[after].loss < self.start

    def facts(self) -> dict[str, Any]:
        """The settings that a track pins; a model's folder below the working directory is named from there."""
        tables = {name: value for name, value in self.recipe.tables().items() if name in _TASK}
        name, here = tables["model"]["name"], Path.cwd()
        if Path(name).is_relative_to(here):
            name = str(Path(name).relative_to(here))
        return {**tables, "model": {**tables["model"], "name": name}, "training": without_rate(self.training)}


def folders_of(given: Sequence[Path]) -> list[Path]:
    """Run folders, also those in a row's folder that ``fedferret compare`` wrote.

    Args:
        given: run folders, and folders with runs named ``seed-N``.

    Returns:
        Run folders, each once.
    """
    found: list[Path] = []
    for folder in given:
        rows = [] if (folder / "recipe.toml").exists() else sorted(folder.glob("seed-*"))
        found += rows or [folder]
    return list({folder.resolve(): folder for folder in found}.values())


def without_rate(training: Mapping[str, Any]) -> dict[str, Any]:
    """The training's settings without the learning rate."""
    return {name: value for name, value in training.items() if name != "learning_rate"}


def read_tracks(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The tracks in a file.

    Args:
        path: of a TOML file like ``records.toml``.

    Returns:
        By name the title and the settings that are pinned, as ``RecordRun.facts``.

    Raises:
        UserError: the file is missing or has a table that is no track.
    """
    tables, tracks = read_toml(path, "there is no such file of tracks"), dict[str, tuple[str, dict[str, Any]]]()
    for name, table in tables.items():
        if not isinstance(table, dict) or not isinstance(table.get("title"), str):
            raise UserError(f"{path}: {name} is no track: it needs a title and the tables of a recipe")
        if "like" in table and not (isinstance(table["like"], str) and table["like"] in tables):
            raise UserError(f"{path}: {name}.like={table['like']!r}: there is no such track")
        settings = merged(tables[table["like"]], table) if "like" in table else dict(table)
        training = settings.pop("training", {})
        plain = {key: value for key, value in settings.items() if key not in ("title", "like")}
        try:
            recipe = from_tables({**plain, "algorithm": {"name": "fedavg", "training": training}})
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from None
        tracks[name] = table["title"], RecordRun(path, recipe, Run()).facts()
    if not tracks:
        raise UserError(f"{path}: it has no track")
    return tracks


def nearest_track(runs: Sequence[RecordRun], tracks: Mapping[str, tuple[str, dict[str, Any]]]) -> str:
    """The track from which the runs differ in the fewest settings.

    Args:
        runs: contenders and controls.
        tracks: as read.

    Returns:
        A name.
    """
    facts = [_leaves(run.facts()) for run in runs]
    wanted = {name: _leaves(track) for name, (_, track) in tracks.items()}
    return min(wanted, key=lambda name: sum(len(each.items() ^ wanted[name].items()) for each in facts))


def _leaves(table: Mapping[str, Any], where: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in table.items():
        found |= _leaves(value, f"{where}{name}.") if isinstance(value, Mapping) else {f"{where}{name}": repr(value)}
    return found


def control_of(controls: Sequence[RecordRun]) -> list[RecordRun]:
    """The runs of FedAvg at the rate with most of the seeds, and of several such rates the lowest mean loss.

    Args:
        controls: runs of FedAvg, at one or several rates.
    """
    rates = {run.rate for run in controls}
    groups = [[run for run in controls if run.rate == rate] for rate in rates]

    def order(group: list[RecordRun]) -> tuple[int, float]:
        losses = [run.loss for run in group if math.isfinite(run.loss)]
        return -len({run.recipe.seed for run in group}), statistics.fmean(losses) if losses else math.inf

    return min(groups, key=order)


def rules_of(
    contenders: Sequence[RecordRun], controls: Sequence[RecordRun], track: Mapping[str, Any]
) -> tuple[list[Rule], dict[int, float]]:
    """Check every rule.

    Args:
        contenders: runs of the method.
        controls: runs of FedAvg at all rates.
        track: the settings that are pinned.

    Returns:
        The rules, and the share of each seed that both sides have.
    """
    control = control_of(controls)
    sides, everybody = [*contenders, *control], [*contenders, *controls]
    shares = shares_of(contenders, control)
    mean = statistics.fmean(shares.values()) if shares else math.nan
    worst = [f"{run.folder}: {change}" for run in everybody if (change := difference(dict(track), run.facts()))]
    unequal = [f"{run.folder}: {_weighting(run)}" for run in sides if _weighting(run) != "equal"]
    odd = [f"{run.folder}: {change}" for run in controls if (change := _not_plain(run))]
    rules = [
        _rule("track", worst, "every run has the track's settings", "there: the track; here: the run; no difference"),
        _rule(
            "control", odd, f"FedAvg at {control[0].rate:g}", "FedAvg with default settings but for weights and rate"
        ),
        _rule("whole runs", _broken(sides), f"{len(sides)} whole runs", "finished, no failure, rewinding or new data"),
        _rule("seeds", _seeds(contenders, control), f"{len(sides)} runs", "seeds 1, 2 and 3 of each side, once each"),
        _rule("one method", _others(contenders) + _others(control), "equal settings", "one setting for all seeds"),
        _rule("weighting", unequal, "equal", 'weighting = "equal" on both sides'),
        _rule("best rate", _unproved(control, controls), f"{control[0].rate:g}", _BRACKET),
        _rule("same task", _different(everybody), "equal weights, data and cohorts", "the same SHA-256 on both sides"),
        _rule("one global model", _personal(sides), "one model, one held-out set", "no figure of personal models"),
        _rule("ledger", _uncounted(sides), "bytes of every message", "every client of every round is counted"),
    ]
    reached = len(shares) == len(SEEDS) and mean >= SHARE
    found = f"{mean:.2%} in the mean of {len(shares)} seeds"
    return [*rules, Rule("target", reached, found, f"at least {SHARE:.0%} in the mean of three")], shares


_BRACKET = "FedAvg at a lower and a higher rate, each 1.5 to 4 times away, has no lower loss (one seed is enough)"


def shares_of(contenders: Sequence[RecordRun], control: Sequence[RecordRun]) -> dict[int, float]:
    """The share of FedAvg's loss reduction, by seed that both sides have finished.

    Args:
        contenders: runs of the method.
        control: runs of FedAvg.
    """
    by_seed = {run.recipe.seed: run for run in control}
    shares = {}
    for run in sorted(contenders, key=lambda each: each.recipe.seed):
        other = by_seed.get(run.recipe.seed)
        if other and math.isfinite(run.loss) and other.start > other.loss:
            shares[run.recipe.seed] = (other.start - run.loss) / (other.start - other.loss)
    return shares


def p_value(shares: Sequence[float], least: float = SHARE) -> float:
    """One-sided t test of three shares: how likely shares this high are where the mean is ``least``.

    Args:
        shares: of three seeds.
        least: the mean under the hypothesis.

    Returns:
        p of Student's distribution with two degrees of freedom; NaN if all shares are equal.
    """
    spread = statistics.stdev(shares) / math.sqrt(len(shares))
    if not spread or len(shares) != 3:
        return math.nan
    t = (statistics.fmean(shares) - least) / spread
    return 0.5 - t / (2 * math.sqrt(2 + t * t))


def _rule(name: str, faults: Sequence[str], found: str, allowed: str) -> Rule:
    return Rule(name, not faults, "; ".join(faults) or found, allowed)


def _not_plain(run: RecordRun) -> str:
    """The first setting in which a control is not FedAvg's default; "" if none."""
    known = {**FEDAVG, "weighting": _weighting(run), "training": run.training}
    name, table = run.recipe.algorithm.name, run.recipe.tables()["algorithm"]
    return name if name != "fedavg" else difference(known, table)


def _weighting(run: RecordRun) -> str:
    return str(getattr(run.recipe.algorithm, "weighting", "it has no such setting"))


def _broken(runs: Sequence[RecordRun]) -> list[str]:
    faults = []
    for each in runs:
        run = each.run
        what = [f"{run.done} of {each.recipe.rounds} rounds"] if run.status != "finished" else []
        what += ["no loss after the last round"] if run.status == "finished" and not math.isfinite(each.loss) else []
        what += [f"{len(run.failures)} failures"] if run.failures else []
        what += [f"{len(run.rewinds)} rewindings"] if run.rewinds else []
        what += ["other data from a round on"] if run.changed_data else []
        faults += [f"{each.folder}: {', '.join(what)}"] if what else []
    return faults


def _seeds(contenders: Sequence[RecordRun], control: Sequence[RecordRun]) -> list[str]:
    faults = []
    for side, runs in (("contender", contenders), ("FedAvg", control)):
        seeds = [run.recipe.seed for run in runs]
        faults += [f"seed {seed} of {side} is missing" for seed in SEEDS if seed not in seeds]
        faults += [
            f"seed {seed} of {side} is there {seeds.count(seed)} times" for seed in set(seeds) if seeds.count(seed) > 1
        ]
        faults += [f"seed {seed} of {side} is none of the three" for seed in set(seeds) - set(SEEDS)]
    return faults


def _others(runs: Sequence[RecordRun]) -> list[str]:
    first = runs[0].recipe.tables()["algorithm"]
    changes = [(run.folder, difference(first, run.recipe.tables()["algorithm"])) for run in runs[1:]]
    return [f"{folder}: {change}" for folder, change in changes if change]


def _unproved(control: Sequence[RecordRun], controls: Sequence[RecordRun]) -> list[str]:
    rate, known, least, most = control[0].rate, {run.recipe.seed: run.loss for run in control}, *FACTORS
    others = [run for run in controls if run.rate != rate and (run.diverged or run.recipe.seed in known)]
    faults = []
    for side, near in (
        ("lower", [run for run in others if least <= rate / run.rate <= most]),
        ("higher", [run for run in others if least <= run.rate / rate <= most]),
    ):
        faults += [] if near else [f"no run of FedAvg at a {side} rate than {rate:g}"]
        for other in near:
            if not other.diverged and not other.loss >= known[other.recipe.seed]:
                faults.append(
                    f"{other.folder}: {other.loss:.3f} at {other.rate:g}, {known[other.recipe.seed]:.3f} at {rate:g}"
                )
    return faults


def _different(runs: Sequence[RecordRun]) -> list[str]:
    tasks, faults = [(run, task_of(run.run)) for run in runs], []
    faults += [f"{run.folder}: other weights at the start" for run, task in tasks if task.base != tasks[0][1].base]
    first: dict[int, Any] = {}
    for run, task in tasks:
        other = first.setdefault(run.recipe.seed, task)
        faults += [f"{run.folder}: other data"] if task.data != other.data else []
        pairs = zip(task.cohorts.split(), other.cohorts.split(), strict=False)  # a diverged run has fewer rounds
        faults += [f"{run.folder}: other clients were sampled"] if any(one != two for one, two in pairs) else []
    return faults


def _personal(runs: Sequence[RecordRun]) -> list[str]:
    faults, sizes = [], dict[int, Any]()
    for run in runs:
        scored = [run.run.evaluations.get(number) for number in (0, run.recipe.rounds)]
        if not run.recipe.algorithm.has_global_model or any(each and each.who != "global" for each in scored):
            faults.append(f"{run.folder}: figures are of the clients' own models")
        elif not all(scored):
            faults.append(f"{run.folder}: no loss before round 1 or after the last round")
        for each in filter(None, scored):
            name, figures = next(iter(each.results.items()))
            size = name, figures.get("tokens", figures.get("examples"))
            if sizes.setdefault(run.recipe.seed, size) != size:
                faults.append(f"{run.folder}: the held-out set is another one")
    return list(dict.fromkeys(faults))


def _uncounted(runs: Sequence[RecordRun]) -> list[str]:
    faults = []
    for run in runs:
        for number, entry in run.run.rounds.items():
            missing = [name for name in entry.clients if not (entry.bytes_up.get(name) and name in entry.bytes_down)]
            if missing:
                faults.append(f"{run.folder}: no bytes of {missing[0]} in round {number}")
                break
    return faults
