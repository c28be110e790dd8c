"""Make the C library give large blocks of memory back the moment they are freed.

glibc keeps freed blocks of up to 32 MB for reuse. Training frees and takes thousands of unlike sizes, so what it keeps
grows by a tenth of a gigabyte a step (SmolLM2-135M, LOG.md). With a fixed threshold every larger block is a mapping of
its own. Speed is what it costs: fresh pages are zeroed again.
"""

from __future__ import annotations

import ctypes
import platform

_THRESHOLD_PARAMETER = -3  # M_MMAP_THRESHOLD in malloc.h
_THRESHOLD = 1 << 20  # bytes


def return_large_blocks() -> bool:
    """Do so in this process, from now on.

    Returns:
        Whether this C library can.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_THRESHOLD_PARAMETER, _THRESHOLD))
