"""The processes of a grid's runs: a worker imports once and forks a child for every run.

    grid's process                 worker                            child, one per run
    {recipe, folder, output} --->  import what the run needs
                                   fork ---------------------------> run; standard output and error go to ``output``
    {outcome, reason} <----------  wait <--------------------------- {outcome, reason}

So each run has a separate process, with a separate peak memory, and no crash reaches the grid or another run. The
worker trains nothing and starts no threads, so forking the worker is safe. Forking the caller of ``compare`` is not.
Where forking is unreliable (libraries of macOS start threads), every run gets a separate worker.

A worker has a separate session: Ctrl-C in a terminal reaches only the grid's process, which interrupts the workers.
A worker ends when its standard input ends, that is, when the grid's process ends in any way.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

from fedferret.core.imports import quick_imports

FORKS = sys.platform == "linux"
_NOT_FINITE = re.compile(r"loss is -?(nan|inf)|NaN or infinity")  # in messages of clients and of the pool


@dataclass(frozen=True)
class Outcome:
    """The end of a run's process, with the reason of a failure."""

    outcome: Literal["finished", "diverged", "failed", "interrupted"]
    reason: str = ""


class Worker:
    """A worker, as the grid's process sees it. ``select`` can wait for its run to end."""

    def __init__(self, threads: int, forks: bool = FORKS) -> None:
        """Start no process yet.

        Args:
            threads: that torch and its libraries may use in a run.
            forks: whether the worker forks a child for every run.
        """
        self._threads, self._forks = threads, forks
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, recipe: str, folder: Path, output: Path) -> None:
        """Start a run.

        Args:
            recipe: as TOML.
            folder: the run folder.
            output: file to which the run's standard output and error are appended.
        """
        if self._process is None:
            command = [sys.executable, "-P", "-m", __name__, *([] if self._forks else ["--once"])]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
                start_new_session=True,
            )
        job = {"recipe": recipe, "folder": str(folder), "output": str(output), "threads": self._threads}
        pipe = self._pipe("stdin")
        pipe.write(json.dumps(job).encode() + b"\n")
        pipe.flush()

    def fileno(self) -> int:
        """The file descriptor that is readable when the run is over.

        Returns:
            Of the pipe to the run's process.
        """
        return self._pipe("stdout").fileno()

    def finish(self) -> Outcome:
        """Wait for the started run and return its outcome.

        Returns:
            What became of the run; a process that was killed has failed.
        """
        assert self._process is not None
        line = self._pipe("stdout").readline()
        if not line:
            return Outcome("failed", _ended(self._gone()))
        if not self._forks:
            self._gone()
        return Outcome(**json.loads(line))

    def interrupt(self) -> None:
        """Interrupt the run, as Ctrl-C does. The run leaves a resumable folder and ends soon."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End the worker and its run at once."""
        if self._process is not None:
            if not self._forks:
                self._process.kill()
            self._gone()

    def _gone(self) -> int:
        assert self._process is not None
        for name in ("stdin", "stdout"):
            self._pipe(name).close()
        process, self._process = self._process, None
        return process.wait()

    def _pipe(self, name: str) -> IO[bytes]:
        pipe: IO[bytes] | None = getattr(self._process, name)
        assert pipe is not None
        return pipe


class Server:
    """The worker process. It passes an interrupt of the grid's process on to the run."""

    def __init__(self) -> None:
        self._child: int | None = None
        self._stopping = False

    def outcome(self, job: Mapping[str, Any]) -> Outcome:
        """Run a job in a child. If the grid's process ends meanwhile, the child and this process end too.

        Args:
            job: recipe as TOML, folder, output and threads of a run.

        Returns:
            What became of the run.
        """
        _import_for(job)
        reading, writing = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until both processes have their handlers
        if not self._stopping:
            self._child = os.fork()
            if self._child == 0:
                _child(job, writing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        os.close(writing)
        outcome = _read(reading, self._end)
        os.close(reading)
        if self._child is None:
            return Outcome("interrupted")
        child, self._child = self._child, None
        _, status = os.waitpid(child, 0)
        if not outcome:
            return Outcome("failed", _ended(os.waitstatus_to_exitcode(status)))
        return Outcome(**json.loads(outcome))

    def interrupt(self, *_: object) -> None:
        """The handler of Ctrl-C."""
        self._stopping = True
        if self._child is not None:
            os.kill(self._child, signal.SIGINT)

    def _end(self) -> NoReturn:
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        sys.exit()


def run_job(job: Mapping[str, Any]) -> Outcome:
    """Run a job in this process.

    Args:
        job: recipe as TOML, folder, output and threads of a run.

    Returns:
        What became of the run; nothing is raised.
    """
    import tomllib

    import torch

    from fedferret.config import from_tables
    from fedferret.core.errors import RunError, UserError
    from fedferret.runner import run

    try:
        torch.set_num_threads(job["threads"])
        with Path(job["output"]).open("ab") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        run(from_tables(tomllib.loads(job["recipe"])), Path(job["folder"]))
        return Outcome("finished")
    except KeyboardInterrupt:  # the runner's Interrupted is one
        return Outcome("interrupted")
    except (RunError, UserError) as error:
        reason = " ".join(str(error).split())
        return Outcome("diverged" if _NOT_FINITE.search(reason) else "failed", reason)
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {error} (the traceback is in {job['output']})")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _child(job: Mapping[str, Any], writing: int) -> NoReturn:
    code = 1
    try:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            outcome = run_job(job)
        except KeyboardInterrupt:
            outcome = Outcome("interrupted")
        os.write(writing, json.dumps(asdict(outcome)).encode())
        code = 0
    finally:
        os._exit(code)


def _read(pipe: int, ended: Callable[[], NoReturn]) -> bytes:
    """Read ``pipe`` to its end; call ``ended`` if standard input ends first."""
    data = b""
    while True:
        ready, _, _ = select.select([0, pipe], [], [])
        if 0 in ready:  # the end of standard input: no job arrives while another one runs
            ended()
        piece = os.read(pipe, 1 << 16)
        if not piece:
            return data
        data += piece


def _import_for(job: Mapping[str, Any]) -> None:
    """Import what the run needs, the model's code included, so that children need not.

    Only the child looks for its device, because that starts the GPU's driver, which does not survive a fork.
    """
    import tomllib
    from dataclasses import replace

    with quick_imports():
        import torch

        import fedferret.runner
        import fedferret.tracking.plots  # noqa: F401
        from fedferret.build import check
        from fedferret.config import from_tables

    # a fork inherits OpenMP's record of its threads but not the threads, and would wait for them for ever
    torch.set_num_threads(1)
    recipe = from_tables(tomllib.loads(job["recipe"]))
    check(replace(recipe, execution=replace(recipe.execution, device="cpu")))


def _ended(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}{', memory may have run out' if name == 'SIGKILL' else ''}"
    return f"its process ended with code {code} and without a message"


def main() -> None:
    """Serve jobs, one line of JSON each, until standard input ends."""
    once, server = "--once" in sys.argv, Server()
    signal.signal(signal.SIGINT, signal.default_int_handler if once else server.interrupt)
    with os.fdopen(os.dup(1), "w") as outcomes:  # a copy, because a run redirects standard output
        while line := sys.stdin.readline():
            job = json.loads(line)
            outcome = run_job(job) if once else server.outcome(job)
            print(json.dumps(asdict(outcome)), file=outcomes, flush=True)
            if once:
                return


if __name__ == "__main__":
    main()
