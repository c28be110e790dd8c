"""Signals that end a command as Ctrl-C does: SIGTERM, and SIGHUP when its terminal goes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

CTRL_C = 130  # exit code, 128 and SIGINT


class Stopped(KeyboardInterrupt):
    """A command was told to end. ``code`` is the exit code that shells give to the signal."""

    def __init__(self, message: str = "stopped", code: int = CTRL_C) -> None:
        super().__init__(message)
        self.code = code


def code_of(error: KeyboardInterrupt) -> int:
    """The exit code of what ended a command.

    Args:
        error: of Ctrl-C or another signal.

    Returns:
        130, 143 or 129.
    """
    return error.code if isinstance(error, Stopped) else CTRL_C


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped on SIGTERM and SIGHUP, once: what then writes its last files is not stopped by the next of them.

    A SIGHUP that is ignored stays ignored, as `nohup` wants it. Outside the main thread nothing happens.

    Returns:
        A context manager; after it signals are handled as before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if number == getattr(signal, "SIGHUP", None):
            _print_nowhere()
        raise Stopped(code=128 + number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_nowhere() -> None:
    """Send what is printed from now on to nobody: the terminal is gone, and writing to it is an error."""
    for stream in (1, 2):
        with suppress(OSError):
            if os.isatty(stream):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
