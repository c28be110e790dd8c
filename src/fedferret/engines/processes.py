"""Resident processes on one machine as a transport: started, watched, and started again when they end.

    Processes(folders)            one process for each site's folder; a message to a site goes only to that process
    Processes.simulating(n, ...)  n workers in a temporary folder, each with all clients' data; any takes any message

This is an engine for a machine with several cores or devices, and the place where faults are tested: tests kill and
stop these processes and send them invalid messages, as could happen to any site. They end with this process, however
it ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from fedferret.core.files import write_atomically
from fedferret.engines.relay import SOCKET, call
from fedferret.engines.workers import Lost, Workers

GRACE = 5.0  # seconds that a process has to end once its standard input is closed


class Processes(Workers):
    """A transport over resident processes."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        program: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Create a transport; processes start with their first message.

        Args:
            folders: the folder of each worker or site, with ``site.toml``, by name.
            program: the command of a resident process, to which a folder and ``--with-parent`` are added.
            environment: added to this process's environment.
        """
        super().__init__(list(folders))
        self._folders, self._program, self._environment = dict(folders), tuple(program), dict(environment or {})
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(folders)), thread_name_prefix="messages")
        self._temporary = contextlib.ExitStack()
        self._closed = False

    @classmethod
    def simulating(cls, count: int, site_toml: str, program: Sequence[str], root: Path | None = None) -> Processes:
        """Create a transport over workers that have all clients' data.

        Args:
            count: number of workers.
            site_toml: content of each worker's ``site.toml``.
            program: as in ``__init__``.
            root: where the workers' folders are made; None: in a temporary folder.
        """
        temporary = contextlib.ExitStack()
        if root is None:
            root = Path(temporary.enter_context(tempfile.TemporaryDirectory(prefix="fedferret-")))
        folders = {f"worker-{number}": root / f"worker-{number}" for number in range(1, count + 1)}
        for folder in folders.values():
            write_atomically(folder / "site.toml", site_toml)
        processes = cls(folders, program)
        processes._temporary = temporary
        return processes

    @property
    def process_ids(self) -> dict[str, int]:
        """Ids of the processes that run now, by worker."""
        return {name: process.pid for name, process in list(self._running.items()) if process.poll() is None}

    def send(self, worker: str, message: bytes, timeout: float) -> Future[bytes]:
        """See Workers. Each exchange runs in a thread, so that large messages go to many workers at once."""
        return self._threads.submit(self._call, worker, message, time.monotonic() + timeout)

    def wait(self, handles: Collection[Any], timeout: float) -> Collection[Any]:
        """See Workers."""
        return wait(handles, timeout, return_when=FIRST_COMPLETED).done

    def result(self, handle: Future[bytes]) -> bytes:
        """See Workers."""
        return handle.result()

    def abandon(self, worker: str) -> None:
        """See Workers."""
        if process := self._running.pop(worker, None):
            _end(process, grace=0.0)

    def close(self) -> None:
        """See Workers."""
        self._closed = True
        for process in list(self._running.values()):
            if process.stdin:
                process.stdin.close()
        for process in list(self._running.values()):
            _end(process, GRACE)
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._running.values():  # a thread may have started one meanwhile
            _end(process, grace=0.0)
        self._running.clear()
        self._temporary.close()

    def _call(self, worker: str, message: bytes, end: float) -> bytes:
        process = self._running.get(worker)
        try:
            if process is None or process.poll() is not None:
                process = self._start(worker, end)
            return call(self._folders[worker] / SOCKET, message, end - time.monotonic())
        except TimeoutError:
            raise
        except OSError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the socket closes a moment before the process ends
                process and process.wait(1.0)
            raise Lost(_ended(process) or f"it does not reply ({error})") from None

    def _start(self, worker: str, end: float) -> subprocess.Popen[bytes]:
        """Start a process for ``worker`` and wait until it is ready. Raises Lost, or TimeoutError after ``end``."""
        if old := self._running.pop(worker, None):
            _end(old, grace=0.0)
        if self._closed:
            raise Lost("the run is over")
        command = [*self._program, str(self._folders[worker]), "--with-parent"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **self._environment},
            start_new_session=True,  # Ctrl-C reaches only this process
        )
        self._running[worker] = process
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError("it did not start in time")
        if process.stdout.readline() != b"ready\n":
            process.wait()
            raise Lost(f"it did not start: {_ended(process)}")
        return process


def _ended(process: subprocess.Popen[bytes] | None) -> str:
    """How a process ended, in words; "" while it runs."""
    code = None if process is None else process.poll()
    if code is None:
        return ""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
