"""The run package (FAB): what a Flower server sends to its nodes as the code of a run. Ours holds no code.

It only names two modules of the installed fedferret, so it depends on fedferret's version alone. Server and sites each
make it, byte for byte the same, and a site refuses a package with another SHA-256. The archive is not compressed,
because compressors differ between Python builds. The format is Flower's (`flwr/cli/build.py`).
"""

from __future__ import annotations

import hashlib
import io
import zipfile

from fedferret import __version__

_PROJECT = f"""\
[project]
name = "fedferret-run"
version = "{__version__}"
description = "Names modules of the installed fedferret; holds no code."
license = {{ text = "Apache-2.0" }}
dependencies = []

[tool.flwr.app]
publisher = "fedferret"

[tool.flwr.app.components]
serverapp = "fedferret.sites.server_app:app"
clientapp = "fedferret.engines.flower_relay:app"
"""


def run_package() -> bytes:
    """Return the archive: ``pyproject.toml`` and Flower's list of contents (name, SHA-256, bits)."""
    project = _PROJECT.encode()
    contents = f"pyproject.toml,{hashlib.sha256(project).hexdigest()},{8 * len(project)}".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("pyproject.toml", project), (".info/CONTENT", contents)):
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.create_system = 3  # the same on every system
            archive.writestr(entry, data)
    return buffer.getvalue()


def fingerprint(package: bytes) -> str:
    """Return the SHA-256 of a run package, hexadecimal."""
    return hashlib.sha256(package).hexdigest()
