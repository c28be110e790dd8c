"""How soon the command answers: the processor time of ``fedferret --help``, beside that of importing torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks.measure import Figure, Measurement, alternate, main

LIMIT = 0.6  # seconds of processor time


def processor_seconds(command: Sequence[str]) -> Measurement:
    """Measures user and system time of a process that runs ``command``."""

    def measure() -> float:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0  # reaped here: there is nothing left for Popen to wait for
        return usage.ru_utime + usage.ru_stime

    return measure


def figures() -> Iterator[Figure]:
    """The command against its limit, and against what it avoids."""
    python = [sys.executable, "-c"]
    helps = processor_seconds([*python, "from fedferret.cli import main; main()", "--help"])
    imports = processor_seconds([*python, "import torch"])
    against_limit = alternate(helps, lambda: LIMIT)
    yield Figure("`fedferret --help` against 0.6 s of processor time", against_limit, "at most", 1.0)
    yield Figure("`fedferret --help` against `import torch`", alternate(helps, imports), "at most", 1.0)


if __name__ == "__main__":
    main("startup", "The command answers at once.", figures)
