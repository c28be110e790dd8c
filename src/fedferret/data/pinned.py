"""The files that a run or a site reads, by name and SHA-256: a file that was read is a file that is pinned.

    data        what the source reads: training and held-out rows
    model       of a model's folder all that is not weights: configuration, tokenizer, chat template; the fingerprint of
                the base covers the weights
    template    the file that ``text.template`` names
    adapter     of the folder that ``algorithm.adapter`` names: its settings and weights

Data may grow, so its files can be accepted as changed. A changed tokenizer or template makes other tokens of the same
text, which no option accepts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError

Pins = dict[str, dict[str, str]]  # by kind, the SHA-256 of each file by its name

DATA = "data"
OPTION = "--accept-changed-data"
_SETTINGS = ("path", "held_out_path")  # of sources that read local files and do not say which
_READ = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # of a model's folder, beside weights
_INDEX = ".index.json"  # lists the files of the weights


def sha256(path: Path) -> str:
    """Hash a file.

    Args:
        path: of the file.

    Returns:
        SHA-256 of its bytes, as 64 hexadecimal digits.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): put it back") from None


def pins(source: Any, model: str, template: str, adapter: str | None = None, near: Iterable[Path] = ()) -> Pins:
    """Hash everything that a run reads beside weights.

    Args:
        source: of the data.
        model: its name, or the path of its folder.
        template: of texts: a name, or the path of a file.
        adapter: the folder of an adapter to begin from, if any.
        near: folders below which files are named relative to them, so that a project can move.

    Returns:
        By kind, SHA-256 by file; a kind without files is left out.

    Raises:
        UserError: a file cannot be read.
    """
    places = [place.resolve() for place in near]
    kinds = {DATA: data_files(source), "model": model_files(model), "template": template_files(template)}
    kinds["adapter"] = tuple(path for path in Path(adapter).glob("adapter_*") if path.is_file()) if adapter else ()
    return {
        kind: {_name(path, places): sha256(path) for path in sorted(set(paths))}
        for kind, paths in kinds.items()
        if paths
    }


def data_files(source: Any) -> tuple[Path, ...]:
    """List the user's files that a source reads.

    Args:
        source: of the data, or a site's table of it.

    Returns:
        What ``files_read`` of the source says; else the files that its settings name. Files that are missing are left
        out, because the source itself reports them.
    """
    if hasattr(source, "files_read"):
        return tuple(source.files_read())
    given = [value for name in _SETTINGS for value in _texts(getattr(source, name, None))]
    local = getattr(source, "files", None)  # of the source "sites", where all files are on one machine
    given += [value for value in local.values() if isinstance(value, str)] if isinstance(local, Mapping) else []
    return tuple(path for path in map(Path, given) if path.is_file())


def model_files(model: str) -> tuple[Path, ...]:
    """List the files of a model's folder that are read and are no weights.

    Args:
        model: as in a recipe.

    Returns:
        Paths, in order; none where the model is not a folder.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return ()
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return tuple(sorted(path for path in found if path.suffix in _READ and _INDEX not in path.name and path.is_file()))


def template_files(template: str) -> tuple[Path, ...]:
    """List the file of a template.

    Args:
        template: as in a recipe.

    Returns:
        Its path; none where the template is no file.
    """
    path = Path(template)
    return (path,) if template not in ("chat", "alpaca") and path.is_file() else ()


def difference(known: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Say which file is another one.

    Args:
        known: SHA-256 by file, as pinned.
        found: the same, as the files are now.

    Returns:
        The first file that was edited, came or went, and what happened to it; "" where all are the same.
    """
    for name in sorted({*known, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in known:
            return f"{name} is new"
        if known[name] != found[name]:
            return f"{name} was edited (SHA-256 {known[name][:12]}… then, {found[name][:12]}… now)"
    return ""


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [each for each in value if isinstance(each, str)] if isinstance(value, list | tuple) else []


def _name(path: Path, places: Iterable[Path]) -> str:
    resolved = path.absolute()
    return next((str(resolved.relative_to(each)) for each in places if resolved.is_relative_to(each)), str(resolved))
