"""Hand over a tuned model: as a Hugging Face folder, or as its log alone, kilobytes that rebuild it from the base.

A folder has the plain model's architecture: LoRA is merged into the base weights. A learned prompt has no place there;
its folder is an adapter of peft's, for the base, as LoRA's is where the adapter alone is asked for.

A delta file is one encoded message (checksummed, see ``wire/codec.py``): which base, by name and SHA-256 of its
weights; which method, with its settings; the log; and the SHA-256 of the weights that applying it must give.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedferret.begun import begun_recipe, check_start
from fedferret.build import load_base, prepare
from fedferret.config import DEFAULT_OBJECTIVE, ModelSettings, Recipe, build_algorithm, build_objective
from fedferret.core import tree
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.errors import RunError, UserError
from fedferret.core.files import check_place, write_atomically
from fedferret.core.keys import Key
from fedferret.core.log import Log, LogUpdate
from fedferret.core.messages import message
from fedferret.core.node import Node
from fedferret.core.stages import StagedPublic
from fedferret.core.task import Task
from fedferret.core.text import plain_line, shortened
from fedferret.disk import kept_rounds
from fedferret.engines.client_store import held, load_state
from fedferret.export_dtype import chosen_dtype, round_to, widen
from fedferret.models.adapters import adapter_of
from fedferret.models.folders import refuse_filled
from fedferret.models.huggingface import Dtype
from fedferret.models.pruning import without_zero_rows
from fedferret.objectives.interface import Loaded, ModelObjective
from fedferret.settings import build, table_of
from fedferret.tracking import checkpoint
from fedferret.wire import codec

_NAMED = 3  # clients in a hint
_FULL = {"dtype": "fp32", "quantised": None}  # how a base is held unless a recipe says otherwise


@message
class DeltaFile:
    """A tuned language model without its base, as versions before there were other objectives wrote it."""

    base_name: str
    base_fingerprint: str
    method: str
    settings: str
    seed: int
    rounds: int
    version: int
    snapshot: bytes | None
    records: tuple[bytes, ...]
    fingerprint: str


@message
class TunedDelta:
    """A tuned model without its base."""

    base_name: str
    base_fingerprint: str  # of all the base's weights
    objective: str  # JSON: its name and settings, what of the model was trained, on how many tokens of a text
    method: str
    settings: str  # JSON: the method's own
    seed: int
    rounds: int  # planned
    version: int  # of the log, that the following lead to
    snapshot: bytes | None
    records: tuple[bytes, ...]
    fingerprint: str  # of the weights that the method tunes

    @classmethod
    def of(cls, recipe: Recipe, update: LogUpdate, base_fingerprint: str) -> TunedDelta:
        """What a delta file of a run holds; the fingerprint of the tuned weights is not taken yet."""
        how = {"name": recipe.objective.name, "train": recipe.model.train, "max_tokens": recipe.text.max_tokens}
        bits = {"dtype": recipe.model.dtype, "quantised": recipe.model.quantised}
        if bits != _FULL:  # versions before there was another precision read the rest
            how.update(bits)
        objective = {**how, **table_of(recipe.objective)}
        return cls(
            recipe.model_name,
            base_fingerprint,
            json.dumps(objective),
            recipe.algorithm.name,
            json.dumps(table_of(recipe.algorithm)),
            recipe.seed,
            recipe.rounds,
            update.version,
            update.snapshot,
            update.records,
            "",
        )

    def going_on_from(self, adapter: Path) -> TunedDelta:
        """This delta with the adapter that its run went on from in another folder. Raises UserError."""
        settings = json.loads(self.settings)
        if not isinstance(settings, dict) or not settings.get("adapter"):
            raise UserError(f"--adapter {adapter}: the run of this delta went on from no adapter")
        return replace(self, settings=json.dumps({**settings, "adapter": str(adapter)}))

    def parts(self) -> tuple[ModelObjective, str | None, AnyAlgorithm]:
        """The objective, what of the model was trained, and the method. Raises UserError."""
        try:
            objective, settings = json.loads(self.objective), json.loads(self.settings)
            name, train, *_ = [objective.pop(word) for word in ("name", "train", "max_tokens")]
            for word in _FULL:
                objective.pop(word, None)
            return build_objective(name, objective), train, build_algorithm(self.method, dict(settings))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = plain_line(f"{type(error).__name__}: {error}")
            raise UserError(f"the log of {self.method} cannot be applied, its settings are none ({reason})") from None

    def base(self, name: str) -> ModelSettings:
        """The base of that name, dense, in the dtype that the run held it in. Raises UserError."""
        _, train, _ = self.parts()
        dtype = json.loads(self.objective).get("dtype", "fp32")
        return build(ModelSettings, {"name": name, "dtype": dtype, **({"train": train} if train else {})}, "model")


def export_folder(
    run: Path,
    folder: Path,
    log: Callable[[str], None] = print,
    dtype: Dtype | None = None,
    adapter_alone: bool = False,
    base_name: str | None = None,
    client: str | None = None,
    prune: bool = False,
) -> str:
    """Write the tuned model of ``run`` as a Hugging Face folder. Returns the SHA-256 of the weights that were tuned.

    With ``adapter_alone`` the folder has what peft reads beside the base, and nothing is merged. ``dtype`` is that of
    the weights; None: see ``chosen_dtype``. ``base_name`` is another place of the same base. The model of ``client`` is
    written where one is named; ``prune`` leaves out rows of an image model that are zero.

    Raises UserError for what is no run with a finished round, RunError where the base is not the one it began from.
    """
    check_free(folder)
    recipe, entries = _read_run(run, base_name)
    private = None if client is None else _private_state(run, recipe, client)
    base, fingerprint = load_base(recipe.objective, replace(recipe.model, quantised=None), log=log)
    fingerprint = recipe.algorithm.start_fingerprint(fingerprint)
    check_start(run, fingerprint, entries.version)
    delta = TunedDelta.of(recipe, entries.since(0), fingerprint)
    return _write_folder(base, delta, folder, log, dtype, adapter_alone, private, prune)


def check_free(folder: Path) -> None:
    """Refuse a folder that cannot be written, or is not empty, before long work. Raises UserError."""
    check_place(folder)
    refuse_filled(folder)


def export_delta(run: Path, path: Path, log: Callable[[str], None] = print, base_name: str | None = None) -> TunedDelta:
    """Write the log of ``run`` as a delta file at ``path``. Raises as ``export_folder`` does."""
    check_place(path)
    if path.exists():
        raise UserError(f"{path} exists: nothing is overwritten, give another name")
    recipe, entries = _read_run(run, base_name)
    base, fingerprint = load_base(recipe.objective, replace(recipe.model, quantised=None), log=log)
    fingerprint = recipe.algorithm.start_fingerprint(fingerprint)
    check_start(run, fingerprint, entries.version)
    delta = TunedDelta.of(recipe, entries.since(0), fingerprint)
    with _tuned(base, delta) as (_, _, model):
        delta = replace(delta, fingerprint=tree.fingerprint(tree.parameters(model)))
    write_atomically(path, codec.encode(delta))
    return delta


def apply_delta(
    base_name: str,
    path: Path,
    folder: Path,
    log: Callable[[str], None] = print,
    adapter: Path | None = None,
    dtype: Dtype | None = None,
) -> str:
    """Rebuild a tuned model from its base and a delta file, as a folder. Returns the SHA-256 of the tuned weights.

    ``adapter`` is where the adapter is that the run went on from, if it is not where the run had it. ``dtype`` is that
    of the weights; None: see ``chosen_dtype``.

    Raises UserError for a file that is no delta, is damaged, or belongs to another base; RunError where this machine
    arrives at other weights than the file says.
    """
    check_free(folder)
    delta = read_delta(path)
    if adapter is not None:
        delta = delta.going_on_from(adapter)
    objective, _, algorithm = delta.parts()
    objective.check_model(base_name)
    base, found = load_base(objective, delta.base(base_name), log=log)
    found = algorithm.start_fingerprint(found)
    if found != delta.base_fingerprint:
        raise UserError(
            f"{path} belongs to the base {delta.base_name} (SHA-256 {delta.base_fingerprint[:12]}…); "
            f"{base_name} is another (SHA-256 {found[:12]}…)"
        )
    return _write_folder(base, delta, folder, log, dtype)


def read_delta(path: Path) -> TunedDelta:
    """The delta file at ``path``. Raises UserError."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would wait, and a device never ends
        raise UserError(f"{path}: not a delta file: it is no file")
    try:
        delta = codec.decode(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `fedferret export RUN --delta FILE` makes one") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except codec.OtherVersion as error:
        raise UserError(f"{path} was {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a delta file: {error}") from None
    if isinstance(delta, DeltaFile):
        old = {field.name: getattr(delta, field.name) for field in fields(delta)}
        delta = TunedDelta(objective=json.dumps({"name": DEFAULT_OBJECTIVE, "train": None, "max_tokens": None}), **old)
    if not isinstance(delta, TunedDelta):
        raise UserError(f"{path}: not a delta file: it holds a {type(delta).__name__}")
    if not delta.fingerprint:
        raise UserError(
            f"{path} states no SHA-256 of the tuned weights, so nothing shows that they are the right ones: "
            f"write it again with `fedferret export RUN --delta FILE`"
        )
    return delta


def _read_run(run: Path, base_name: str | None) -> tuple[Recipe, Log]:
    """The recipe, with its base in another place if that is given, and the log."""
    recipe = begun_recipe(run)
    if not checkpoint.saved_round(run):
        raise UserError(f"{run}: no round is finished yet, so there is nothing to export")
    if base_name is not None:
        recipe.objective.check_model(base_name)
        recipe = replace(recipe, model=replace(recipe.model, name=base_name))
    return recipe, checkpoint.read_log(run)


def _private_state(run: Path, recipe: Recipe, client: str) -> Any:
    """What a client of a simulation kept after its last counted round. Raises UserError, RunError."""
    known = checkpoint.progress(run)
    versions = {} if known is None else known.versions
    if client not in versions:
        raise UserError(f"--client {shortened(client)}: {_trained(client, versions, run)}")
    if client not in kept_rounds(recipe, versions):
        raise UserError(f"--client {client}: {recipe.algorithm.name} keeps nothing at its clients; leave --client out")
    states, round = run / "state" / "clients", versions[client] + 1
    if not held(states, client, round):
        raise UserError(
            f"--client {client}: its state is not in {states}; where sites hold the data, it is at the site"
        )
    return load_state(states, client, round, codec)


def _trained(given: str, known: Iterable[str], run: Path) -> str:
    """Which clients have trained: those with the nearest names, or the first few and where all are listed."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=_NAMED)
    shown = ", ".join(map(shortened, close or names[:_NAMED]))
    if close:
        return f"no client of this name has trained in {run}; near it are {shown}"
    rest = f" and {len(names) - _NAMED:,} more, all in {run}/report.html" if len(names) > _NAMED else ""
    return f"no client of this name has trained in {run}; those that have are {shown}{rest}"


@contextmanager
def _tuned(base: Loaded, delta: TunedDelta, private: Any = None) -> Iterator[tuple[AnyAlgorithm, Any, nn.Module]]:
    """The method, its public state, and the base's model with the method's adapter, if any, and the log applied."""
    try:
        objective, _, algorithm = delta.parts()
        task = Task.of(prepare(algorithm, base.model, delta.seed), objective, delta.rounds)
        node, _ = Node.start(task, algorithm, delta.seed, codec)
        node.catch_up(LogUpdate(delta.version, delta.snapshot, delta.records))
    except (UserError, RunError):
        raise
    except Exception as error:  # whatever a log brings that was not written for this method and model
        reason = plain_line(f"{type(error).__name__}: {error}")
        raise RunError(
            f"the log of {delta.method} cannot be applied to {base.name} ({reason}): nothing was written"
        ) from None
    shared = ""
    if private is not None:
        with algorithm.model(task, node.public) as model:
            shared = "" if model is None else tree.fingerprint(tree.parameters(model))
    with algorithm.model(task, node.public, private) as model:
        if model is not None and shared == tree.fingerprint(tree.parameters(model)):
            raise UserError(
                f"--client: what {delta.method} keeps at this client is no model, and the client's is the global one; "
                f"leave --client out"
            )
        if model is None:
            plain = adapter_of(task.model)
            if plain is None or plain.merges:
                algorithm.release(task.model)  # says why, where no client's own can be written either
            raise UserError(
                f"{delta.method} has no global model: export a client's own, with --client NAME --to FOLDER"
            )
        yield algorithm, node.public, model


def _write_folder(
    base: Loaded,
    delta: TunedDelta,
    folder: Path,
    log: Callable[[str], None],
    dtype: Dtype | None,
    adapter_alone: bool = False,
    private: Any = None,
    prune: bool = False,
) -> str:
    with _tuned(base, delta, private) as (algorithm, public, model):
        fingerprint = tree.fingerprint(tree.parameters(model))
        if delta.fingerprint and fingerprint != delta.fingerprint:
            raise RunError(
                f"the rebuilt weights have SHA-256 {fingerprint[:12]}…, the file says {delta.fingerprint[:12]}…: "
                f"nothing was written"
            )
        adapter = adapter_of(model)
        if adapter_alone and adapter is None:
            raise UserError(f"{delta.method} tunes the model's own weights: there is no adapter to write; use --to")
        if adapter_alone and (algorithm.changes_base or (isinstance(public, StagedPublic) and public.weights)):
            raise UserError(
                f"{delta.method} changes the weights under its adapter too, which no adapter holds; use --to"
            )
        if adapter is not None and (adapter_alone or not adapter.merges):
            if dtype is not None:
                raise UserError(f"--dtype {dtype}: an adapter alone is exported in fp32; leave --dtype out")
            log(adapter.export(model, base.name, folder, getattr(delta.parts()[0], "classes", ())))
        else:
            objective, how = delta.parts()[0], json.loads(delta.objective)
            dtype = chosen_dtype(dtype, objective, delta.base(base.name), log)
            if quantised := how.get("quantised"):
                log(f"The adapter was tuned over a {quantised} base; it is merged into the checkpoint's own weights.")
            widen(model)
            plain = algorithm.release(model)
            if prune:
                before = tree.size(dict(plain.named_parameters()))
                plain = without_zero_rows(plain)
                log(f"{tree.size(dict(plain.named_parameters())):,} of {before:,} weights are left without zero rows.")
            round_to(plain, dtype, Key.of(delta.seed, "export"))
            released: Any = replace(base, model=plain)  # type: ignore[type-var]  # a dataclass
            log(objective.save(released, folder, how["max_tokens"]))
    return fingerprint
