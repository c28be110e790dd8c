"""The watchdog of nginx: `python -m fedferret.sites.watchdog NGINX CONFIGURATION WATCHED...`, run by `proxy.py`.

nginx is a master process and workers. The watchdog is the master's parent and ends all of them, whatever is killed:

    SIGTERM, or the watchdog's parent ends  ->  nginx ends
    the master ends                         ->  its workers, which would keep the port, are killed; the watchdog ends
    the watchdog is killed                  ->  the kernel ends the master (on Linux), which ends its workers
    a watched file is replaced              ->  nginx reads its files again: a revoked site is refused within seconds

It runs as long as the server, so it imports the standard library only.
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

_LOOK = 1.0  # seconds between checks of the watched files and the parent; signals need no check
_PATIENCE = 5.0  # seconds for nginx to end: it only has to close connections
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def watch(nginx: str, configuration: Path, watched: Sequence[Path]) -> int:
    """Run nginx until it ends, or until SIGTERM, SIGINT or the end of the parent process.

    Args:
        nginx: path of the program.
        configuration: nginx's configuration.
        watched: files that nginx reads again when they are replaced.
    Returns:
        nginx's exit code; 0 if the watchdog ended nginx.
    """
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
    """Inode and modification time of each file; a missing file has none and is no reason to read again."""
    found = [path.stat() for path in watched if path.exists()]
    return [(one.st_ino, one.st_mtime_ns) for one in found]


if __name__ == "__main__":
    sys.exit(watch(sys.argv[1], Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]]))
