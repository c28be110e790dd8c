"""The versions that the lock files pin, read without a network."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HASHES = ROOT / "requirements-hashes.lock"


def pins(lock: Path) -> dict[str, str]:
    """The version of each package that a lock pins, by canonical name, without the suffix of a build.

    Args:
        lock: A requirements file, with or without hashes.

    Returns:
        Versions by package.

    Raises:
        ValueError: If a line pins no exact version.
    """
    found: dict[str, str] = {}
    for line in lock.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        text = re.split(r"\s--hash=|(?:^|\s)#", line)[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        exact = re.fullmatch(r"==([^+*,]+)(\+\w+)?", str(requirement.specifier))
        if exact is None:
            raise ValueError(f"{lock.name}: {text!r} pins no exact version")
        found[canonicalize_name(requirement.name)] = exact[1]
    return found
