"""The supervisor: starts processes, watches them, starts them again, and ends them together.

    Part("trainer", command, log)  --start-->  a process in a new session, with its output in the log file
    process ended                  --poll--->  logged once, started again after 1, 2, 4, ... 15 seconds
    close                          --------->  SIGTERM in reverse order, SIGKILL if that takes too long

No process outlives its supervisor: on Linux the kernel sends it SIGTERM when the supervisor ends, even by SIGKILL.
A supervisor must therefore run in its process's main thread, and must start no process from another thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from filelock import FileLock, Timeout

from fedferret.core.errors import UserError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0  # seconds before a process is started again; doubled each time
HEALTHY = 60.0  # seconds after which a process counts as healthy: the next pause is FIRST_PAUSE again
LARGEST_LOG = 10_000_000  # bytes; at a start, a larger log is renamed to `.old` and a new one begun
LONGEST_OUTPUT = 1 << 16  # bytes of a log that are read to find out why its process ended
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Part:
    """A process to keep running: its name in messages, its command, and the file for its output."""

    name: str
    command: Sequence[str]
    log: Path | None  # None: to the terminal
    environment: Mapping[str, str] = field(default_factory=dict)  # added to this process's
    stops_by: signal.Signals = signal.SIGTERM


@dataclass
class _Watched:
    part: Part
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = field(default_factory=lambda: FIRST_PAUSE)
    due: float = 0.0  # when to start it again
    written: int = 0  # bytes in the log when it was started


class Supervisor:
    """Keeps parts running. Logs the same line about a part only once, until the part is healthy again."""

    def __init__(self, log: Callable[[str], None], explain: Callable[[Part, int, str], str]) -> None:
        """Create a supervisor without parts.

        Args:
            log: called with a line for the operator.
            explain: called with a part, its exit code and its output since it was started, when its process ended;
                returns a line for the operator, or "".
        """
        self._log, self._explain = log, explain
        self._watched: dict[str, _Watched] = {}
        self._logged: dict[str, str] = {}  # the last line about each part

    def start(self, part: Part) -> None:
        """Start a part, and keep it running."""
        self._watched[part.name] = _Watched(part)
        self._launch(self._watched[part.name])

    def poll(self, *names: str) -> None:
        """Check these parts once, or all of them: log which ended, start those that are due."""
        for name in names or list(self._watched):
            watched = self._watched.get(name)
            if watched is None:
                continue
            code = watched.process.poll() if watched.process else None
            if watched.process and code is not None:
                self._ended(watched, code)
            if watched.process is None and time.monotonic() >= watched.due:
                self._launch(watched)

    def knows(self, name: str) -> bool:
        """Return whether a part of this name was started."""
        return name in self._watched

    def process(self, name: str) -> int | None:
        """Return the id of a part's process; None if no process runs."""
        watched = self._watched.get(name)
        running = watched is not None and watched.process is not None and watched.process.poll() is None
        return watched.process.pid if watched and watched.process and running else None

    def output(self, name: str) -> str:
        """Return the output of a part since its last start, at most the last ``LONGEST_OUTPUT`` bytes."""
        watched = self._watched[name]
        if watched.part.log is None or not watched.part.log.exists():
            return ""
        with watched.part.log.open("rb") as log:
            log.seek(max(watched.written, log.seek(0, os.SEEK_END) - LONGEST_OUTPUT))
            return log.read().decode(errors="replace")

    def exit_code(self, name: str) -> int | None:
        """Return the exit code of a part's process; None while it runs."""
        watched = self._watched[name]
        return watched.process.poll() if watched.process else None

    def stop(self, name: str, patience: float = 10.0) -> None:
        """End a part, and do not start it again.

        Args:
            name: of the part.
            patience: seconds until SIGKILL.
        """
        watched = self._watched.pop(name, None)
        if watched is None or watched.process is None:
            return
        if watched.process.poll() is None:
            watched.process.send_signal(watched.part.stops_by)
            try:
                watched.process.wait(patience)
            except subprocess.TimeoutExpired:
                watched.process.kill()
        watched.process.wait()

    def close(self) -> None:
        """End all parts, in reverse order."""
        for name in reversed(list(self._watched)):
            self.stop(name)

    def _launch(self, watched: _Watched) -> None:
        part = watched.part
        output = _open_log(part.log) if part.log else None
        watched.written = output.tell() if output else 0
        try:
            watched.process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env={**os.environ, **part.environment},
                start_new_session=True,  # Ctrl-C reaches only the supervisor, which ends the parts in order
                preexec_fn=tie_to(os.getpid()) if sys.platform == "linux" else None,
            )
        finally:
            if output:
                output.close()
        watched.started = time.monotonic()

    def _ended(self, watched: _Watched, code: int) -> None:
        name, now = watched.part.name, time.monotonic()
        if now - watched.started >= HEALTHY:
            watched.pause = FIRST_PAUSE
            self._logged.pop(name, None)
        line = self._explain(watched.part, code, self.output(name))
        if line and self._logged.get(name) != line:
            self._logged[name] = line
            self._log(line)
        watched.process, watched.due = None, now + watched.pause
        watched.pause = min(2 * watched.pause, LONGEST_PAUSE)


def ended(code: int) -> str:
    """Return how a process ended, in words, from its exit code."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


@contextmanager
def terminable() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, which service managers send."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("stopped")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder for this process.

    Args:
        folder: made where it is missing.
        what: uses the folder, in the message.
    Raises:
        UserError: if another process has the lock.
        OSError: if the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: {what} is running there already; stop it first, or give another folder") from None
    try:
        yield
    finally:
        lock.release()


def _open_log(log: Path) -> IO[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if log.exists() and log.stat().st_size > LARGEST_LOG:
        log.replace(log.with_name(log.name + ".old"))
    return log.open("ab")


def tie_to(parent: int) -> Callable[[], None]:
    """Return a ``preexec_fn`` for Linux: the kernel sends the child SIGTERM when the process ``parent`` ends."""
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before prctl
            os._exit(1)

    return tie
