"""Start a process of this package: ``python -m fedferret.sites server_app|client_app ARGUMENTS``. See these modules."""

from __future__ import annotations

import importlib
import sys

from fedferret.core.imports import quick_imports


def main() -> int | None:
    """Import the module that the first argument names, run its ``start``, and return the exit code."""
    name = sys.argv.pop(1)
    with quick_imports():  # which a module that is itself the program cannot use for its own imports
        module = importlib.import_module(f"fedferret.sites.{name}")
    code: int | None = module.start()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
