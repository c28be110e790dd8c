"""Where the runs of a grid happen: a worker pays for the imports once and forks for every run.

    grid's process                 worker                            its child, one a run
    {recipe, folder, output} --->  import what the run needs
                                   fork ---------------------------> play the run; its words go to ``output``
    {outcome, reason} <----------  wait <--------------------------- {outcome, reason}

So each run has a process of its own, with its own peak of memory, and no crash reaches the grid or another run. The
worker trains nothing and starts no threads: forking it is safe, as forking whoever calls ``compare`` is not.
Where forking is not dependable (macOS's own libraries start threads) every run gets a worker of its own.

A worker has a session of its own, so that Ctrl-C in a terminal reaches the grid alone, which tells the workers. It
ends when its standard input does: when the grid's process is gone, however it went.
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

FORKS = sys.platform == "linux"
_NOT_FINITE = re.compile(r"loss is -?(nan|inf)|NaN or infinity")  # as clients and the pool put it


@dataclass(frozen=True)
class Outcome:
    """How a run's process ended, and why if it failed."""

    outcome: Literal["finished", "diverged", "failed", "interrupted"]
    reason: str = ""


class Worker:
    """The grid's end. ``select`` can wait for it; then ``finish`` says how the run went."""

    def __init__(self, threads: int, forks: bool = FORKS) -> None:
        """``threads``: how many torch and its libraries may use in a run."""
        self._threads, self._forks = threads, forks
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, recipe: str, folder: Path, output: Path) -> None:
        """Begin the run of that recipe, as TOML, in that folder; what it prints is added to the file ``output``."""
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
        """Readable when the run is over."""
        return self._pipe("stdout").fileno()

    def finish(self) -> Outcome:
        """How the run that was started went; waits for it."""
        assert self._process is not None
        line = self._pipe("stdout").readline()
        if not line:
            return Outcome("failed", _ended(self._gone()))
        if not self._forks:
            self._gone()
        return Outcome(**json.loads(line))

    def interrupt(self) -> None:
        """Ctrl-C for the run: it leaves its folder resumable and is over soon."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End the worker, and at once whatever it is at."""
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
    """The worker's end. The grid's process interrupts the worker alone, which passes it on to the run."""

    def __init__(self) -> None:
        self._child: int | None = None
        self._stopping = False

    def outcome(self, job: Mapping[str, Any]) -> Outcome:
        """Play the job's run in a child. Should the grid's process end meanwhile, so do the child and this one."""
        _import_for(job)
        reading, writing = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until both sides know what to do with it
        if not self._stopping:
            self._child = os.fork()
            if self._child == 0:
                _child(job, writing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        os.close(writing)
        answer = _read(reading, self._end)
        os.close(reading)
        if self._child is None:
            return Outcome("interrupted")
        child, self._child = self._child, None
        _, status = os.waitpid(child, 0)
        return Outcome(**json.loads(answer)) if answer else Outcome("failed", _ended(os.waitstatus_to_exitcode(status)))

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


def carry_out(job: Mapping[str, Any]) -> Outcome:
    """Play the job's run in this process."""
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
    except KeyboardInterrupt:  # the runner's own Interrupted too
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
            outcome = carry_out(job)
        except KeyboardInterrupt:
            outcome = Outcome("interrupted")
        os.write(writing, json.dumps(asdict(outcome)).encode())
        code = 0
    finally:
        os._exit(code)


def _read(pipe: int, ended: Callable[[], NoReturn]) -> bytes:
    """All that comes out of ``pipe``; calls ``ended`` should standard input end before."""
    answer = b""
    while True:
        ready, _, _ = select.select([0, pipe], [], [])
        if 0 in ready:  # no job comes before this one is answered
            ended()
        piece = os.read(pipe, 1 << 16)
        if not piece:
            return answer
        answer += piece


def _import_for(job: Mapping[str, Any]) -> None:
    """Import what the run will need, its model's code too: children have it for nothing.

    The device is left to the child: to ask for one starts the GPU's driver, which does not outlive a fork.
    """
    import tomllib
    from dataclasses import replace

    import torch

    import fedferret.runner
    import fedferret.tracking.plots  # noqa: F401
    from fedferret.config import from_tables
    from fedferret.experiment import check

    torch.set_num_threads(
        1
    )  # a fork inherits no threads, only OpenMP's belief that it has some: it would wait for ever
    recipe = from_tables(tomllib.loads(job["recipe"]))
    check(replace(recipe, execution=replace(recipe.execution, device="cpu")))


def _ended(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}{', memory may have run out' if name == 'SIGKILL' else ''}"
    return f"its process ended with code {code} and without a word"


def main() -> None:
    """Serve jobs, a line of JSON each, until standard input ends."""
    once, server = "--once" in sys.argv, Server()
    signal.signal(signal.SIGINT, signal.default_int_handler if once else server.interrupt)
    with os.fdopen(os.dup(1), "w") as answers:  # what a run prints is no answer
        while line := sys.stdin.readline():
            job = json.loads(line)
            outcome = carry_out(job) if once else server.outcome(job)
            print(json.dumps(asdict(outcome)), file=answers, flush=True)
            if once:
                return


if __name__ == "__main__":
    main()
