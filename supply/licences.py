"""Refuse dependencies with a licence that is not allowed: ``python -m supply.licences``; ``--write`` renews the list.

pip-licenses reads what each installed package states. ``accepted.toml`` has the licences that are allowed, word for
word, and packages that are accepted for a reason, whatever they state.
"""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence

from packaging.utils import canonicalize_name
from supply.audit import ACCEPTED
from supply.pins import LOCK, ROOT, pins

PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences of the dependencies

`make lock` writes this page from what the packages of `requirements.lock` state. `make check` refuses a
licence that is not in `supply/accepted.toml`. PyTorch's CUDA build adds NVIDIA's libraries, under NVIDIA's own terms.
Models and data are no dependencies: [models](models.md#licences), [data](data.md).

| package | version | licence |
|---|---|---|
"""


def installed() -> dict[str, tuple[str, str]]:
    """Version and stated licence of every package of this environment, by canonical name."""
    command = [sys.executable, "-m", "piplicenses", "--format=json", "--from=mixed", "--with-system"]
    packages = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        canonicalize_name(package["Name"]): (package["Version"], package["License"])
        for package in packages
        if package["Name"] != "fedferret"
    }


def refused(licences: Mapping[str, str], allowed: Sequence[str], reasons: Mapping[str, str]) -> list[str]:
    """A line for each package with a licence that is not allowed.

    Args:
        licences: What each package states: SPDX, or names of classifiers that are separated by semicolons.
        allowed: Statements that are allowed, word for word.
        reasons: Patterns of packages that are accepted whatever they state, with the reason.

    Returns:
        The lines, in the order of the packages.
    """
    return [
        f"{name}: the licence {licence!r} is not allowed"
        for name, licence in licences.items()
        if not set(licence.split("; ")) <= set(allowed)
        and not any(fnmatch.fnmatchcase(name, pattern) and reason.strip() for pattern, reason in reasons.items())
    ]


def main(words: Sequence[str]) -> None:
    """Check the installed packages; with ``--write`` renew docs/licences.md."""
    policy = tomllib.loads(ACCEPTED.read_text(encoding="utf-8"))["licences"]
    packages = installed()
    licences = {name: licence for name, (_, licence) in packages.items()}
    if lines := refused(licences, policy["allowed"], policy["packages"]):
        lines.append("Use another package, or allow the licence in supply/accepted.toml")
        sys.exit("\n".join(lines))
    if "--write" in words:
        rows = [f"| {name} | {version} | {licences[name]} |\n" for name, version in sorted(pins(LOCK).items())]
        PAGE.write_text(HEAD + "".join(rows), encoding="utf-8")
    print(f"Licences: all {len(packages)} packages have one that is allowed")


if __name__ == "__main__":
    main(sys.argv[1:])
