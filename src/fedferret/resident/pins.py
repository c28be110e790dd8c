"""The files that a site reads, pinned in its ``site.toml``: edited ones are refused by name.

    [files.data]                  # rows, and rows to score on
    "ward-7.jsonl" = "9f2c…"      # SHA-256 when this site first read it
    [files.model]                 # of the model's folder what is not weights
    [files.template]              # the file that a recipe's text.template names
    [files.adapter]               # of the folder that ``adapter`` names

The tables are written by the trainer and follow everything else in the file. Whoever deletes a line accepts the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.core.files import write_atomically
from fedferret.data.pinned import DATA, Pins, difference
from fedferret.recipe_file import read_toml

FILE = "site.toml"
TABLE = "files"
MISSING = "there is no such file; it names the site and its data"
_HEAD = re.compile(r"\s*\[\s*(\w+)")


def pin(folder: Path, found: Pins) -> None:
    """Refuse files that were edited, and pin those that are read for the first time.

    Args:
        folder: of the site.
        found: the files as they are now.

    Raises:
        UserError: in one line that names the file.
    """
    path = folder / FILE
    known = _known(path)
    for kind, files in found.items():
        before = known.get(kind, {})
        # runs may name other models and templates, but a site has the same data in all of them
        names = {*before, *files} if kind == DATA and before else before.keys() & files.keys()
        what = difference(*({name: each[name] for name in names & each.keys()} for each in (before, files)))
        if what:
            accept = "give `fedferret join` --accept-changed-data" if kind == DATA else f"delete its line in {path}"
            raise UserError(f"{what} since this site first read it: restore it, or {accept}")
    now = {kind: {**known.get(kind, {}), **found.get(kind, {})} for kind in {*known, *found}}
    if now != known:
        write_atomically(path, without(path.read_text(encoding="utf-8-sig")) + _text(now))


def forget_data(folder: Path) -> None:
    """Accept the data of a site as it is: what is pinned of it is dropped.

    Args:
        folder: of the site.

    Raises:
        UserError: ``site.toml`` cannot be read.
    """
    path = folder / FILE
    left = {kind: files for kind, files in _known(path).items() if kind != DATA}
    write_atomically(path, without(path.read_text(encoding="utf-8-sig")) + _text(left))


def without(text: str) -> str:
    """The text of ``site.toml`` without its tables of pinned files.

    Args:
        text: of the file.
    """
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if head := _HEAD.match(line):
            inside = head[1] == TABLE
        if not inside:
            kept.append(line)
    return "".join(kept).rstrip() + "\n"


def _known(path: Path) -> Pins:
    found = read_toml(path, MISSING).get(TABLE, {})
    if not isinstance(found, dict) or not all(isinstance(files, dict) for files in found.values()):
        raise UserError(f"{path}: {TABLE} holds no tables of files: delete it, and the files are pinned again")
    return {kind: {str(name): str(digest) for name, digest in files.items()} for kind, files in found.items()}


def _text(pins: Pins) -> str:
    import tomli_w

    return "\n" + tomli_w.dumps({TABLE: pins}) if any(pins.values()) else ""
