"""Keeps one nginx: `python -m fedferret.sites.watchdog NGINX CONFIGURATION WATCHED...`, run by `proxy.py`.

nginx is a master and workers. This process stands between them and whoever started it, so that they come and go as
one, whatever is killed:

    asked to end, or the starter is gone  ->  nginx ends
    the master is gone                    ->  its workers, who would hold the port, are ended, and so does this one
    this one is killed                    ->  the kernel ends the master (on Linux), which ends its workers
    a watched file is replaced            ->  nginx reads its files again: a revoked site is out within seconds

Standard library alone: it lives as long as the server does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_LOOK = 1.0  # seconds between looks at the watched files and the parent; ending and a gone master are noticed at once
_PATIENCE = 5.0  # seconds for nginx to end by itself: it only has to close connections
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def watch(nginx: str, configuration: Path, watched: Sequence[Path]) -> int:
    """Run nginx until it ends or is to end; its exit code, 0 if it was asked to."""
    parent, woken, asked = os.getppid(), threading.Event(), threading.Event()

    def ask(*_: object) -> None:
        asked.set()
        woken.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    signal.signal(signal.SIGCHLD, lambda *_: woken.set())
    command = [nginx, "-p", str(configuration.parent), "-c", str(configuration)]
    tie = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=(lambda: tie(_PR_SET_PDEATHSIG, signal.SIGTERM)) if tie else None,
    )
    try:
        seen = _stamps(watched)
        while process.poll() is None and not asked.is_set() and os.getppid() == parent:
            if (now := _stamps(watched)) != seen:
                seen = now
                process.send_signal(signal.SIGHUP)
            woken.wait(_LOOK)
            woken.clear()
        if process.poll() is not None:
            return process.returncode
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        return 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stamps(watched: Sequence[Path]) -> list[tuple[int, int]]:
    """What changes when a file is replaced; a missing one has none and is no reason to read again."""
    found = [path.stat() for path in watched if path.exists()]
    return [(one.st_ino, one.st_mtime_ns) for one in found]


if __name__ == "__main__":
    sys.exit(watch(sys.argv[1], Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]]))
