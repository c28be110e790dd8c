"""The settings of a site, ``site.toml``, and what a recipe becomes with them.

    name = "ward-7"
    model = "/models/smollm2"     # where this site has the base model, if not under the recipe's name
    adapter = "/models/adapter"   # where it has the adapter that a run goes on from (`algorithm.adapter`)
    device = "cpu"

    [data]
    path = "ward-7.jsonl"         # and columns, as for the data source "files"

    [policy]                      # what servers may ask for; see ``policy.py``
    [files]                       # written by the trainer; see ``pins.py``

A recipe that comes over the wire says what to do with the data, never which data: only this file does. Without [data]
the recipe's source is loaded and any client works here, as in a worker of a simulation.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.examples import Example, FederatedData
from fedferret.data.held_out import hold_out
from fedferret.data.paths import located, named
from fedferret.data.pinned import Pins, pins
from fedferret.data.sites import SiteFile
from fedferret.recipe_file import read_toml
from fedferret.resident.pins import FILE, MISSING, pin
from fedferret.resident.policy import Policy
from fedferret.settings import build, table_of

if TYPE_CHECKING:
    from fedferret.config import Recipe
    from fedferret.engines.trainer import Work


@dataclass(frozen=True, kw_only=True)
class Site:
    """The settings of one site."""

    name: str  # as the run's list of sites has it
    data: SiteFile | None = None  # None: the recipe's own data, in a simulation
    model: str | None = None  # None: the recipe's name for it, found in this site's cache or on its disk
    adapter: str | None = None  # None: this site takes no part in runs that go on from an adapter
    device: str = "cpu"  # "cpu", "cuda", "cuda:1", "mps" or "auto"
    memory: Literal["fast", "lean"] = "fast"  # lean: the replica waits in a memory-mapped file
    threads: int | None = None  # of torch; None: as many as it takes, a site has a machine for itself
    policy: Policy = field(default_factory=Policy)  # what a server may ask for
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # SHA-256 of files that were read; pins.py
    history: int = 10  # past rounds with private states that stay, for a run that the server rewinds

    def __post_init__(self) -> None:
        if self.history < 0:
            raise UserError(f"history={self.history}: must not be negative; 0 keeps what a run needs that goes on")
        if not self.name or not self.name.isprintable():
            raise UserError(f"name={self.name!r}: give the name that the run's list of sites has")

    def to_toml(self) -> str:
        """The text of ``site.toml``."""
        import tomli_w

        table = table_of(self)
        if self.policy == Policy():
            del table["policy"]
        if not self.files:
            del table["files"]
        return tomli_w.dumps({name: value for name, value in table.items() if value != "none"})


def read_site(folder: Path) -> Site:
    """The settings in ``folder``; a relative data file is looked for there. Raises UserError."""
    path = folder / FILE
    tables = read_toml(path, MISSING)
    data, policy = tables.pop("data", None), tables.pop("policy", {})
    if data is not None and not isinstance(data, Mapping):
        raise UserError(f"{path}: data={data!r}: must be a table, [data], with a path")
    if not isinstance(policy, Mapping):
        raise UserError(f"{path}: policy={policy!r}: must be a table, [policy]")
    site = replace(build(Site, tables, FILE), policy=build(Policy, policy, f"{FILE}: policy"))
    if data is None:
        return site
    file = build(SiteFile, data, f"{FILE}: data")
    held_out = file.held_out_path and located(file.held_out_path, folder)
    local = replace(file, path=located(file.path, folder), held_out_path=held_out)
    return replace(site, data=local)


def allow(site: Site, text: str, base: str) -> None:
    """Refuse a run that the site's policy excludes, before its model is loaded.

    Args:
        site: the settings of this site.
        text: the recipe, as TOML.
        base: SHA-256 of the base weights, as the request names it.

    Raises:
        UserError: the policy excludes it, or the recipe is none.
    """
    if site.policy == Policy():
        return
    from fedferret.config import written  # late, like the imports of ``work``

    recipe = written(tomllib.loads(text))
    site.policy.check(recipe, base, len(check_data(site)))
    site.policy.check_fetch(adapted(site, recipe).model.name)


def pins_of(site: Site, folder: Path, recipe: Recipe | None = None) -> Pins:
    """Hash the files that a site reads beside weights.

    Args:
        site: the settings of this site.
        folder: of the site; files below it are named relative to it.
        recipe: adapted to this site; None: what the site reads before it knows one.

    Returns:
        By kind, SHA-256 by file.

    Raises:
        UserError: a file cannot be read.
    """
    model, template = (recipe.model.name, recipe.text.template) if recipe else (site.model or "", "chat")
    goes_on = recipe is None or getattr(recipe.algorithm, "adapter", None) is not None
    return pins(site.data, model, template, site.adapter if goes_on else None, near=[folder])


def check_data(site: Site, log: Callable[[str], None] = lambda line: None) -> Sequence[Example]:
    """The site's examples, read before any server is met. Raises UserError for a file or a row that is of no use."""
    if site.data is None:
        return ()
    site.data.held_out()
    return site.data.load(log)


def work(
    site: Site,
    home: Path | None,
    recipe: str,
    folder: Path | None,
    log: Callable[[str], None] = lambda line: None,
) -> Work:
    """What a recipe becomes here: model and data loaded.

    Args:
        site: the settings of this site.
        home: the site's folder, where files are pinned; None: a worker, which pins nothing.
        recipe: as TOML.
        folder: of the run at this site; None keeps nothing on disk.
        log: called with lines on slow steps.

    Raises:
        UserError: the recipe cannot run here.
    """
    # imported late: a mistake in the site's own files is told before seconds of importing PyTorch
    from fedferret.build import Parts, check, load_data
    from fedferret.config import written
    from fedferret.disk import site_states
    from fedferret.engines.trainer import Work

    settings = adapted(site, written(tomllib.loads(recipe)))
    if site.data is None:
        check(settings)
        data = load_data(settings)
    else:
        if home:
            pin(home, pins_of(site, home, settings))
        rows, kept = check_data(site, log), site.data.held_out(log)
        data = FederatedData({site.name: rows}, {}, named(site.data.path), kept={site.name: kept} if kept else {})
        if not kept and settings.held_out_share:
            data = hold_out(data, settings.held_out_share, Key.of(settings.seed, "held out"), log)
        settings.objective.check_examples(settings.model.name, data, complete=False)
        if stated := site_states(settings, site.history):
            log(stated)
    parts = Parts.over(settings, data, folder, log)
    node, _ = parts.start_node()
    with settings.algorithm.model(parts.task, node.public) as model:
        scores = site.policy.scores and (settings.scores_clients or model is None)  # without a global model always
    held_out = parts.examples.held_out_by_client if scores else {}
    return Work(node, parts.examples, parts.base_fingerprint, data.fingerprint, held_out)


def adapted(site: Site, recipe: Recipe) -> Recipe:
    """The recipe with the site's model, adapter, device and memory; none of them changes what is computed.

    Raises UserError where the run goes on from an adapter and the site has none: the server names no file of a site.
    """
    execution = replace(recipe.execution, device=site.device, memory=site.memory, engine="in-process")
    model = recipe.model if site.model is None else replace(recipe.model, name=site.model)
    algorithm: Any = recipe.algorithm
    if site.data is not None and getattr(algorithm, "adapter", None) is not None:
        if site.adapter is None:
            raise UserError(
                f"algorithm.adapter: the run goes on from {algorithm.adapter}; set adapter in {FILE} to its folder here"
            )
        algorithm = replace(algorithm, adapter=site.adapter)
    return replace(recipe, execution=execution, model=model, algorithm=algorithm)
