"""The start-up time of the command: processor time of ``fedferret --help``, compared with importing torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks.measure import Figure, Measurement, alternate, main

LIMIT = 0.6  # seconds of processor time


def processor_seconds(command: Sequence[str]) -> Measurement:
    """A measurement of the user and system time of a process that runs ``command``, in seconds."""

    def processor_time() -> float:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0  # wait4 has reaped the process, so Popen must not wait for it
        return usage.ru_utime + usage.ru_stime

    return processor_time


def figures() -> Iterator[Figure]:
    """The command against the limit, and against the import of torch that it avoids."""
    python = [sys.executable, "-c"]
    helps = processor_seconds([*python, "from fedferret.cli import main; main()", "--help"])
    imports = processor_seconds([*python, "import torch"])
    against_limit = alternate(helps, lambda: LIMIT)
    yield Figure("`fedferret --help` against 0.6 s of processor time", against_limit, "at most", 1.0)
    yield Figure("`fedferret --help` against `import torch`", alternate(helps, imports), "at most", 1.0)


if __name__ == "__main__":
    main("startup", "The command starts fast.", figures)
