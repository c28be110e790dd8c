"""Recipes: strict TOML that says what a run is.

    seed, rounds            [model] name            [data] source, template, ... and the source's own settings
    [clients] per_round     [algorithm] name, preset, ... and the method's own settings
    [evaluation]            [execution]

Two kinds of settings, two kinds of tables: all of the above but ``[execution]`` change the numbers and form the run's
identity; ``[execution]`` (engine, device, memory, logging) must not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedferret.algorithms.registry import method
from fedferret.core.algorithm import Algorithm
from fedferret.core.errors import UserError, nearest
from fedferret.core.robust_pooling import PoolSettings
from fedferret.core.weighting import Bounds
from fedferret.data.examples import Source
from fedferret.data.registry import source
from fedferret.data.text import TextSettings
from fedferret.objectives.interface import ModelObjective
from fedferret.objectives.registry import objective
from fedferret.recipe_file import read_tables
from fedferret.recipe_paths import located
from fedferret.renamed_keys import with_new_names
from fedferret.settings import ALTERNATIVES, WHOLE, build, table_of


def _positive(where: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"{name}={value}: must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is tuned."""

    name: str
    train: Literal["head"] | None = None  # "head": a classifier's head alone, on frozen features; None: all weights
    dtype: Literal["fp32", "bf16"] = "fp32"  # in which weights are held; bf16 is half, and rounded at random by a key
    quantised: Literal["4-bit", "8-bit"] | None = None  # a frozen base under an adapter (QLoRA); None: in dtype


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """Who takes part in a round."""

    per_round: int = 4  # clients sampled each round
    min_clients: int = 1  # the run stops, resumable, when fewer send an update
    min_fraction: float = 0.0  # and when a smaller share does; 0: min_clients alone decides
    held_out: float | None = None  # share of each client's examples that it scores on, not trains on; None: source's
    bound_weights: bool | None = None  # whether the next three hold; None: where sites hold the data, and nowhere else
    max_examples: int = 10_000_000  # a claim of more examples counts as this many
    max_over_median: float = 10.0  # and one of more than so many times the cohort's lower median as that
    max_share: float = 0.5  # of all weight that one client has at most, unless fewer than 1 / max_share send an update

    def __post_init__(self) -> None:
        _positive("clients", per_round=self.per_round, min_clients=self.min_clients, max_examples=self.max_examples)
        if not 1 <= self.max_over_median < math.inf:
            raise UserError(f"max_over_median={self.max_over_median}: must be at least 1 and finite")
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise UserError(f"held_out={self.held_out}: give a share of each client's examples, from 0 to below 1")
        if not 0 < self.max_share <= 1:
            raise UserError(f"max_share={self.max_share}: must be above 0 and at most 1")
        if not 0 <= self.min_fraction <= 1:
            raise UserError(f"min_fraction={self.min_fraction}: give a share of the sampled clients, from 0 to 1")
        if self.min_clients > self.per_round:
            raise UserError(f"min_clients={self.min_clients}: more than per_round={self.per_round} are never asked")

    def bounds(self) -> Bounds | None:
        """The limits on the weight that a claim of examples gives; None where claims are trusted."""
        return Bounds(self.max_examples, self.max_over_median, self.max_share) if self.bound_weights else None


Metric: TypeAlias = Literal["loss", "rouge-l", "rouge-l-google", "exact-match", "task-score", "choice"]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured, in fp32, on the held-out sets."""

    every: int = 1  # rounds between evaluations; round 0 and the last are always evaluated
    metrics: tuple[Metric, ...] = ("loss",)  # the loss is measured whether it is named or not
    metrics_every: int | None = None  # rounds between the other metrics; None: round 0 and the last, as papers report
    generate_examples: int = 100  # of each held-out set, drawn by the seed, are answered; fewer are faster and noisier
    max_new_tokens: int = 128  # of an answer; the Ferret and FedKSeed papers'
    per_client: bool | None = None  # clients score what they hold out: mean, worst tenth, spread; None: the objective's
    batch_size: int = 8
    local_only_clients: int = 2  # baseline: so many clients each train alone, as long as the federation; 0: none

    def __post_init__(self) -> None:
        _positive("evaluation", every=self.every, batch_size=self.batch_size, metrics_every=self.metrics_every)
        _positive("evaluation", generate_examples=self.generate_examples, max_new_tokens=self.max_new_tokens)
        if self.local_only_clients < 0:
            raise UserError(f"local_only_clients={self.local_only_clients}: must not be negative; 0 leaves it out")


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """How the run is carried out. None of these may change its numbers."""

    engine: Literal["in-process", "debug", "processes", "ray"] = "in-process"
    workers: int = 2  # of "processes" and "ray", each with a model in memory: more than cores or devices gain nothing
    worker_cpus: float = 1.0  # that Ray reserves for a worker
    worker_gpus: float = 0.0  # likewise; 0.25: four workers share a device
    deadline: float = 3600.0  # seconds of a round; a silent client costs all of them, a shorter one the slow clients
    device: str = "cpu"  # "cpu", "cuda", "cuda:1", "mps" or "auto"; sums may differ in the last bit between devices
    memory: Literal["fast", "lean"] = "fast"  # lean: the public weights wait in a memory-mapped file
    tensorboard: bool = False
    history: int = 10  # rounds before the last that a run can be rewound to; methods with large entries need much disk
    places: tuple[str, ...] = ()  # folders in which relative paths are looked for; written by whoever reads a file

    def __post_init__(self) -> None:
        if self.history < 0:
            raise UserError(f"history={self.history}: must not be negative; 0 keeps the last round alone")
        _positive("execution", workers=self.workers, deadline=self.deadline)
        if self.worker_cpus < 0 or self.worker_gpus < 0:
            raise UserError(f"worker_cpus={self.worker_cpus}, worker_gpus={self.worker_gpus}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe: everything a run needs."""

    seed: int
    rounds: int
    model: ModelSettings
    data: Source
    data_source: str
    objective: ModelObjective
    text: TextSettings
    clients: ClientSettings
    algorithm: Algorithm[Any, Any, Any, Any, Any]
    pool: PoolSettings = field(default_factory=PoolSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # relative paths as given: recipe_paths.py

    def tables(self) -> dict[str, Any]:
        """The recipe as TOML tables, every setting spelt out."""
        tables: dict[str, Any] = {
            "seed": self.seed,
            "rounds": self.rounds,
            "model": table_of(self.model),
            "data": {"source": self.data_source, **table_of(self.data)},
            "objective": {"name": self.objective.name, **table_of(self.objective)},
            "text": table_of(self.text),
            "clients": table_of(self.clients),
            "algorithm": {"name": self.algorithm.name, **table_of(self.algorithm)},
            "pool": table_of(self.pool),
            "evaluation": table_of(self.evaluation),
            "execution": table_of(self.execution),
        }
        return {name: {**table, **self.given[name]} if name in self.given else table for name, table in tables.items()}

    def identity(self) -> dict[str, Any]:
        """The settings that change the numbers: equal for two runs exactly when they must give the same bits."""
        tables = {name: table for name, table in self.tables().items() if name != "execution"}
        if self.objective.name == DEFAULT_OBJECTIVE:  # runs from before there were others keep the name they have
            del tables["objective"]
        else:
            del tables["text"]["cut"]  # texts to classify have no response to cut
        return tables

    @property
    def model_name(self) -> str:
        """The model as the recipe names it: a folder by the path that was given."""
        return str(self.given.get("model", {}).get("name", self.model.name))

    @property
    def scores_clients(self) -> bool:
        """Whether clients score the model on what they hold out, whenever it is evaluated."""
        return bool(self.evaluation.per_client)

    @property
    def held_out_share(self) -> float:
        """The share of its examples that each client holds out; 0: what the source leaves it."""
        asked = self.clients.held_out
        return float(getattr(self.data, "held_out_share", 0.0)) if asked is None else asked

    def identity_toml(self) -> str:
        """The identity as text: what sites are told of the recipe, and what its SHA-256 names a run by."""
        import tomli_w

        tables = self.identity()
        if tables["text"].get("cut") == BEFORE_CUT:  # runs from before there was a choice keep the name they have
            del tables["text"]["cut"]
        return tomli_w.dumps(_without_later(tables))

    def to_toml(self) -> str:
        """The recipe as a file's text."""
        import tomli_w

        return tomli_w.dumps(self.tables())


DEFAULT_OBJECTIVE = "next-token"
_LATER: Mapping[str, Any] = {  # settings that came later, at the values that change nothing
    "dtype": "fp32",
    "quantised": "none",
    "schedule_over": "rounds",
    "warmup": 0.0,
    "rslora": False,
    "dora": False,
    "modules_to_save": [],
    "adapter": "none",
    "faulty_rows": "refuse",
    "text_column": "none",
    "date": "none",
}
BEFORE_CUT = "prompt"  # what ``text.cut`` is in what a fedferret wrote that had no such setting
_SECTIONS = ("model", "data", "objective", "text", "clients", "algorithm", "pool", "evaluation", "execution")


def _without_later(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table as before there were ``_LATER`` settings, where they change nothing: a run keeps its name."""
    kept = {name: value for name, value in table.items() if name not in _LATER or value != _LATER[name]}
    if "warmup" in table and kept.get("schedule") == "constant":  # a server's schedule is older, and has no warm-up
        del kept["schedule"]
    return {name: _without_later(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with ``section.key=value`` overrides. Raises UserError for anything that is not one."""
    return from_tables(read_tables(path, overrides))


def written(tables: Mapping[str, Any]) -> Recipe:
    """The recipe in tables that a fedferret wrote, this one or an earlier one. Raises UserError.

    They spell every setting out; one that is missing did not exist yet, and gets the value that means the same.
    """
    text, chosen = tables.get("text", {}), tables.get("objective", {})
    plain = isinstance(text, Mapping) and isinstance(chosen, Mapping)
    if not plain or chosen.get("name", DEFAULT_OBJECTIVE) != DEFAULT_OBJECTIVE:  # nothing else has a response to cut
        return from_tables(tables)
    return from_tables({**tables, "text": {"cut": BEFORE_CUT, **text}})


def from_tables(tables: Mapping[str, Any]) -> Recipe:
    """The recipe that these TOML tables say. Raises UserError."""
    tables = with_new_names(tables)
    for name, value in tables.items():
        if name not in ("seed", "rounds", *_SECTIONS):
            raise UserError(f"{name}: there is no such setting; {nearest(name, ('seed', 'rounds', *_SECTIONS))}")
        if name in _SECTIONS and not isinstance(value, Mapping):
            raise UserError(f"{name}={value!r}: must be a table, [{name}]")
    for name in ("model", "data", "algorithm"):
        if name not in tables:
            raise UserError(f"[{name}]: this table is missing; a recipe has at least [model], [data] and [algorithm]")
    execution = build(ExecutionSettings, tables.get("execution", {}), "execution")
    tables, given = located(tables, execution.places)
    data, algorithm = dict(tables["data"]), dict(tables["algorithm"])
    data_source, algorithm_name = _take(data, "source", "data"), _take(algorithm, "name", "algorithm")
    kind = source(data_source)
    model = build(ModelSettings, tables["model"], "model")
    chosen = _objective(tables.get("objective", {}), kind).resolved(model.name)
    recipe = Recipe(
        seed=_whole(tables, "seed", 1, 0),
        rounds=_whole(tables, "rounds", 10, 1),
        model=model,
        data=build(kind, data, "data"),
        data_source=data_source,
        objective=chosen,
        text=build(TextSettings, tables.get("text", {}), "text"),
        clients=_clients(tables.get("clients", {}), data_source),
        algorithm=build_algorithm(algorithm_name, algorithm),
        pool=build(PoolSettings, tables.get("pool", {}), "pool"),
        evaluation=_evaluation(tables.get("evaluation", {}), chosen),
        execution=execution,
        given=given,
    )
    _check_objective(recipe.objective, recipe.algorithm)
    if recipe.evaluation.metrics != ("loss",) and not recipe.objective.generates:
        raise UserError(
            f'evaluation.metrics={list(recipe.evaluation.metrics)}: objective "{recipe.objective.name}" has its own '
            f"figures and generates no answers; leave metrics out"
        )
    limit = recipe.algorithm.max_rounds
    if limit is not None and recipe.rounds > limit:
        raise UserError(f"rounds={recipe.rounds}: {algorithm_name} is over after {limit}, set rounds={limit}")
    cohort = recipe.algorithm.per_round
    if cohort is not None and recipe.clients.per_round != cohort:
        raise UserError(
            f"clients.per_round={recipe.clients.per_round}: {algorithm_name} with these settings has {cohort} a round, "
            f"set clients.per_round={cohort}"
        )
    if recipe.pool.name != "mean" and getattr(recipe.algorithm, "shares_nothing", False):
        raise UserError(
            f'pool.name="{recipe.pool.name}": the clients of {algorithm_name} share nothing, so nothing is pooled; '
            f"leave pool.name out"
        )
    recipe.pool.check(recipe.algorithm.pooling, algorithm_name, recipe.clients.per_round)
    return recipe


def _objective(given: Mapping[str, Any], kind: Any) -> ModelObjective:
    """The objective of that name, or the source's; the classes are the source's where it brings its own."""
    table = dict(given)
    name = table.pop("name", getattr(kind, "objective", DEFAULT_OBJECTIVE))
    if not isinstance(name, str):
        raise UserError(f"objective.name={name!r}: must be a name; see `fedferret list`")
    fixed = getattr(kind, "classes", ())
    if fixed and "classes" in {field.name for field in fields(objective(name))}:  # type: ignore[arg-type]  # a dataclass
        table.setdefault("classes", list(fixed))
    return build_objective(name, table)


def build_objective(name: str, table: Mapping[str, Any]) -> ModelObjective:
    """The objective of that name with these settings. Raises UserError."""
    return build(objective(name), table, "objective")


def _check_objective(chosen: ModelObjective, algorithm: Algorithm[Any, Any, Any, Any, Any]) -> None:
    """Refuse a method that cannot take the objective. Raises UserError."""
    takes = algorithm.objectives
    if takes is not None and chosen.name not in takes:
        raise UserError(
            f'{algorithm.name} cannot take objective "{chosen.name}", only {", ".join(takes)}: '
            f"choose another method or objective"
        )


def _clients(table: Mapping[str, Any], data_source: str) -> ClientSettings:
    """The settings, with claims of examples bounded where sites hold the data, if the table does not say."""
    settings = build(ClientSettings, table, "clients")
    if settings.bound_weights is None:
        return replace(settings, bound_weights=data_source == "sites")
    return settings


def _evaluation(table: Mapping[str, Any], chosen: ModelObjective) -> EvaluationSettings:
    """The settings, with scores at the clients where the objective is judged by them, if the table does not say."""
    settings = build(EvaluationSettings, table, "evaluation")
    return replace(settings, per_client=chosen.scores_clients) if settings.per_client is None else settings


def build_algorithm(name: str, table: Mapping[str, Any]) -> Algorithm[Any, Any, Any, Any, Any]:
    """The method of that name; ``preset`` in the table names a set of values that its other settings override."""
    kind, settings = method(name), dict(table)
    preset = settings.pop("preset", None)
    presets = kind.presets
    if preset is not None:
        if preset not in presets:
            allowed = nearest(str(preset), presets) if presets else f"{name} has none"
            raise UserError(f'algorithm.preset="{preset}": there is no such preset; {allowed}')
        settings = merged(presets[preset], settings)
    algorithm = build(kind, settings, "algorithm")
    rate = getattr(algorithm, "server_learning_rate", 1.0)
    if not rate > 0:
        raise UserError(f"algorithm.server_learning_rate={rate}: must be greater than 0")
    return algorithm


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The tables ``below`` with those ``above`` laid over them, setting by setting; who gives one of two alternatives
    takes the other away."""
    given_away = {other for name, other in ALTERNATIVES.items() if name in above and other not in above}
    result = {name: value for name, value in below.items() if name not in given_away}
    for name, value in above.items():
        known = result.get(name)
        nested = isinstance(known, Mapping) and isinstance(value, Mapping)
        result[name] = merged(known, value) if nested else value  # type: ignore[arg-type]  # both are mappings
    return result


def _take(table: dict[str, Any], key: str, section: str) -> str:
    value = table.pop(key, None)
    if not isinstance(value, str):
        raise UserError(f"{section}.{key}: this setting is missing or not a name; see `fedferret list`")
    return value


def _whole(tables: Mapping[str, Any], name: str, default: int, least: int) -> int:
    value = tables.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < WHOLE:
        given = name if isinstance(value, int) and value >= WHOLE else f"{name}={value!r}"  # not thousands of digits
        raise UserError(f"{given}: must be a whole number, at least {least} and below {WHOLE}")
    return value
