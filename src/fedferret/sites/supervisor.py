"""Processes that are started, watched, started again, and ended together.

    Part("trainer", command, log)  --start-->  a process of its own session, its words in the log file
    process gone                   --tend--->  said once, started again after 1, 2, 4, ... 15 seconds
    close                          --------->  asked to end in reverse order, killed where that takes too long

No process outlives its supervisor: on Linux the kernel ends it (SIGTERM) when the supervisor goes, even by SIGKILL.
A supervisor must therefore live in its process's main thread, and starts no process from another.
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
HEALTHY = 60.0  # seconds after which a process counts as having run well: the next pause is the first one again
LARGEST_LOG = 10_000_000  # bytes; at a start, a log beyond that makes way for a new one and is kept as `.old`
LONGEST_WORDS = 1 << 16  # bytes of a log that are read to find out why its process ended
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Part:
    """A process to keep: what it is called in messages, how it starts, where its words go."""

    name: str
    command: Sequence[str]
    log: Path | None  # None: to the terminal
    environment: Mapping[str, str] = field(default_factory=dict)  # beside this process's own
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
    """Keeps parts running. One that ``explain`` has words for is said to be gone once, until it has run well again."""

    def __init__(self, log: Callable[[str], None], explain: Callable[[Part, int, str], str]) -> None:
        """``explain(part, code, words)``: a line for the operator on a process that ended; "" for none.

        ``words`` is what the process wrote to its log since it was started.
        """
        self._log, self._explain = log, explain
        self._watched: dict[str, _Watched] = {}
        self._said: dict[str, str] = {}

    def start(self, part: Part) -> None:
        """Start a part, and keep it."""
        self._watched[part.name] = _Watched(part)
        self._launch(self._watched[part.name])

    def poll(self, *names: str) -> None:
        """See to these parts once, or to all: say what ended, start again what is due."""
        for name in names or list(self._watched):
            watched = self._watched.get(name)
            if watched is None:
                continue
            code = watched.process.poll() if watched.process else None
            if watched.process and code is not None:
                self._ended(watched, code)
            if watched.process is None and time.monotonic() >= watched.due:
                self._launch(watched)

    def process(self, name: str) -> int | None:
        """The id of a part's process, or None while it has none."""
        watched = self._watched.get(name)
        running = watched is not None and watched.process is not None and watched.process.poll() is None
        return watched.process.pid if watched and watched.process and running else None

    def words(self, name: str) -> str:
        """What a part has written to its log since it was last started; of much, the end."""
        watched = self._watched[name]
        if watched.part.log is None or not watched.part.log.exists():
            return ""
        with watched.part.log.open("rb") as log:
            log.seek(max(watched.written, log.seek(0, os.SEEK_END) - LONGEST_WORDS))
            return log.read().decode(errors="replace")

    def code(self, name: str) -> int | None:
        """How a part's process ended; None while it runs."""
        watched = self._watched[name]
        return watched.process.poll() if watched.process else None

    def stop(self, name: str, patience: float = 10.0) -> None:
        """End a part, and keep it no more."""
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
        """End all parts, the last first."""
        for name in reversed(list(self._watched)):
            self.stop(name)

    def _launch(self, watched: _Watched) -> None:
        part = watched.part
        output = _opened(part.log) if part.log else None
        watched.written = output.tell() if output else 0
        try:
            watched.process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env={**os.environ, **part.environment},
                start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor alone, which sees to the order
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
            self._said.pop(name, None)
        line = self._explain(watched.part, code, self.words(name))
        if line and self._said.get(name) != line:
            self._said[name] = line
            self._log(line)
        watched.process, watched.due = None, now + watched.pause
        watched.pause = min(2 * watched.pause, LONGEST_PAUSE)


def ended(code: int) -> str:
    """How a process ended, in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, as a service manager sends it, does what Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("stopped")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process. Raises UserError where another process does."""
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


def _opened(log: Path) -> IO[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if log.exists() and log.stat().st_size > LARGEST_LOG:
        log.replace(log.with_name(log.name + ".old"))
    return log.open("ab")


def tie_to(parent: int) -> Callable[[], None]:
    """For a child to call before it becomes its program: on Linux, it is sent SIGTERM when its parent ends."""
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before that
            os._exit(1)

    return tie
