"""Import large libraries faster, and without their advice."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedferret.core.collection import no_collection

# bitsandbytes, which peft imports where it is installed, advises a package that nothing here uses.
_ADVISES_PACKAGES = "bitsandbytes.backends.cpu.ops"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Collect no garbage inside the block; where it imports, never again look for garbage in what is there after it.

    A library's advice to install another one is not shown.

    Modules hold a million objects and are no garbage. Searching them was a third of a short process's time.

    Returns:
        A context manager; after it garbage is collected as before.
    """
    known, adviser = len(sys.modules), logging.getLogger(_ADVISES_PACKAGES)
    shown, adviser.disabled = adviser.disabled, True
    with no_collection():
        try:
            yield
        finally:
            adviser.disabled = shown
            if len(sys.modules) > known:  # otherwise there may be garbage, and no module among it
                gc.freeze()
