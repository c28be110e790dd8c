"""Two hundred thousand rows: seconds from the imports to the first local step, and memory beside that of 200 rows.

    python -m benchmarks.rows                  this checkout
    python -m benchmarks.rows --source SRC     another checkout's `src`, such as one of before

Each run is another process: `tiny`, FedAvg, one step of one client, partitioned among two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fedferret.tracking.environment import environment

ROWS = 200_000
RECIPE = """
rounds = 1
[model]
name = "tiny"
[data]
source = "files"
path = "PATH"
partition = {clients = 2}
[text]
max_tokens = 64
[clients]
per_round = 1
[algorithm]
name = "fedavg"
training = {steps = 1}
[evaluation]
local_only_clients = 0
"""
PROBE = """
import resource, sys, time
from pathlib import Path
import datasets, flwr_datasets, matplotlib.figure, peft
from fedferret import runner
from fedferret.config import load
from fedferret.local import first_order
settings = load(sys.argv[1])
started, busy = time.perf_counter(), time.process_time()
def report(step, total, seen=[]):
    if not seen:
        seen.append(step)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print("FIRST", time.perf_counter() - started, time.process_time() - busy, memory / 1024)
first_order.report_step = report
runner.run(settings, Path(sys.argv[2]), lambda line: None)
"""


def write(path: Path, count: int) -> None:
    """Rows of some 170 bytes, no two alike."""
    with path.open("w") as file:
        for number in range(count):
            other = number * 7 % 1000
            prompt = f"What is the sum of {number} and {other}, and why is that so?"
            response = f"The sum of the two is {number + other}, because adding the second to the first gives that."
            file.write(json.dumps({"instruction": prompt, "response": response}) + "\n")


def measured(source: Path, folder: Path, count: int) -> dict[str, float]:
    """One run's figures."""
    place = folder / str(count)
    place.mkdir()
    write(place / "rows.jsonl", count)
    (place / "recipe.toml").write_text(RECIPE.replace("PATH", str(place / "rows.jsonl")))
    known = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROBE, str(place / "recipe.toml"), str(place / "run")]
    printed = subprocess.run(command, env=known, check=True, capture_output=True, text=True).stdout
    line = next(each for each in printed.splitlines() if each.startswith("FIRST"))
    seconds, busy, memory = map(float, line.split()[1:])
    size = (place / "rows.jsonl").stat().st_size / 1e6
    return {"seconds": round(seconds, 2), "processor_seconds": round(busy, 2), "mib": round(memory), "file_mb": size}


def main() -> None:
    """Measure, print JSON and a sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "src")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/rows.json, beside what is there")
    parser.add_argument("--name", default="now", help="of the figures in the saved file: before, now")
    given = parser.parse_args()
    with TemporaryDirectory() as name:
        few, many = (measured(given.source.resolve(), Path(name), count) for count in (200, ROWS))
    figures = {"few": few, "many": many, "more_mib": many["mib"] - few["mib"]}
    print(json.dumps(figures, indent=1))
    print(
        f"{ROWS:,} rows, {many['file_mb']:.0f} MB: {many['seconds']:.1f} s to the first step, "
        f"{figures['more_mib']:.0f} MiB more than 200 rows."
    )
    if given.save:
        path = Path(__file__).parent / "results" / "rows.json"
        saved = json.loads(path.read_text()) if path.exists() else {}
        machine = {"machine": environment()}
        path.write_text(json.dumps({**saved, given.name: {**figures, **machine}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
