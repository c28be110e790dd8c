"""Four hospitals on one machine: real processes, real certificates; a site and the server are killed during the run.

    python examples/four-hospitals/run.py [--tiny] [--out FOLDER]

    certificates -> server (nginx, SuperLink, ServerApp) -> four sites, each a process tree with a separate data file
    after round 1 ward-3 is killed and started again; after round 3 the server is; the run ends with a report

The script runs the commands that an operator would run: docs/deployment.md explains each. The sites' texts are four
groups of real people's messages (chitchat-dataset); no site sees another's. With ``--tiny`` the random model of 90,624
weights replaces SmolLM2: a minute or two instead of ten.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.chitchat import Chitchat
from fedferret.data.examples import Example
from fedferret.sites.proxy import find_nginx
from fedferret.tracking.events import FILE, read

HERE = Path(__file__).resolve().parent
SITES = ("ward-1", "ward-2", "ward-3", "ward-4")
COMMAND = [str(Path(sys.executable).with_name("fedferret"))]
LONGEST = 840.0  # seconds that all of this may take


@dataclass
class Federation:
    """The processes of this example; each has a log file in ``out``."""

    out: Path
    port: int
    settings: list[str]  # --set ... of the recipe
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    folder: str = "run"  # of the run, in ``out``

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.out / self.folder

    def start(self, name: str) -> None:
        """Start or restart the server or a site: the command is the same."""
        if name == "server":
            words = ["serve", str(HERE / "recipe.toml"), "--out", str(self.run), "--pki", str(self.out / "pki")]
            words += ["--listen", f"127.0.0.1:{self.port}", *self.settings]
        else:
            words = ["join", f"127.0.0.1:{self.port}", "--name", name, "--folder", str(self.out / "sites" / name)]
            words += ["--data", str(self.out / f"{name}.jsonl")]
            words += ["--credentials", str(self.out / "pki" / "sites" / f"{name}.tar")]
        with (self.out / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([*COMMAND, *words], stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """Send SIGKILL, as a power cut would end it; the processes that it started end with it."""
        self.processes[name].kill()
        self.processes[name].wait()

    def wait(self, what: str, reached: Callable[[], bool]) -> None:
        """Wait until a condition is true; exit if the server ends before.

        Args:
            what: the condition in words.
            reached: returns whether the condition is true.
        """
        while not reached():
            if self.processes["server"].poll() not in (None, 0):
                sys.exit(f"the server ended before {what}; its log ends with:\n{tail(self.out / 'server.log')}")
            if time.monotonic() - self.began > LONGEST:
                sys.exit(f"{LONGEST:.0f} seconds were not enough for {what}; see the logs in {self.out}")
            time.sleep(0.5)

    def log(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def close(self) -> None:
        """End the running processes, in reverse order."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    """Run the example, from the certificates to the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model of 90,624 weights instead of SmolLM2")
    parser.add_argument("--out", type=Path, default=Path("runs/four-hospitals"), help="the folder for all files")
    arguments = parser.parse_args()
    try:
        find_nginx()
    except UserError as error:
        sys.exit(str(error))
    out = arguments.out.resolve()
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty: give another folder with --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    with federation(out, arguments.tiny) as hospitals:
        run(hospitals)


@contextmanager
def federation(out: Path, tiny: bool) -> Iterator[Federation]:
    """Make data files and certificates, and end the processes at the end.

    Args:
        out: the folder for all files.
        tiny: with the tiny model instead of SmolLM2.
    """
    write_data(out, 64 if tiny else 200)
    settings = ["--set", f"data.held_out_path={out / 'held-out.jsonl'}"]
    if tiny:
        settings += ["--set", "model.name=tiny", "--set", "algorithm.coordinates=1024"]
    hospitals = Federation(out, free_port(), settings)
    hospitals.log(f"Certificates of the server and four sites: {out / 'pki'}.")
    fedferret("pki", "init", "--host", "127.0.0.1", "--pki", str(out / "pki"))
    for site in SITES:
        fedferret("pki", "issue", site, "--pki", str(out / "pki"))
    try:
        yield hospitals
    finally:
        hospitals.close()


def run(hospitals: Federation) -> None:
    """Start server and sites, kill ward-3 and the server during the run, and print the result."""
    for name in ("server", *SITES):
        hospitals.start(name)
    hospitals.log(f"The server and {len(SITES)} sites are starting; their logs are in {hospitals.out}.")
    hospitals.wait("round 1", lambda: rounds_done(hospitals.run) >= 1)
    hospitals.kill("ward-3")
    hospitals.log("Round 1 is done. ward-3 was killed; the others go on.")
    hospitals.wait("round 2", lambda: rounds_done(hospitals.run) >= 2)
    hospitals.start("ward-3")
    hospitals.log("Round 2 is done without ward-3, which starts again: the server sends it what it missed.")
    hospitals.wait("round 3", lambda: rounds_done(hospitals.run) >= 3)
    hospitals.kill("server")
    hospitals.log("Round 3 is done. The server was killed, and starts again; it resumes from its log.")
    hospitals.start("server")
    hospitals.wait("the end", lambda: hospitals.processes["server"].poll() == 0)
    hospitals.log("The run is finished.")
    print(fedferret("status", str(hospitals.run)))
    print(fedferret("nodes", str(hospitals.run)))
    events = read(hospitals.run)
    for number, each in sorted(events.rounds.items()):
        lost = ", ".join(f"{failure.client}: {failure.reason}" for failure in each.failures)
        print(
            f"round {number}: {len(each.bytes_up)} of {len(each.clients)} sites replied{f' ({lost})' if lost else ''}"
        )
    losses = [evaluation.loss for _, evaluation in sorted(events.evaluations.items())]
    print(f"held-out loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"Report: {hospitals.run / 'report.html'}")


def write_data(out: Path, examples: int) -> None:
    """Write a data file for each site and a held-out file for the server; no message is in two files.

    Args:
        out: the folder for the files.
        examples: number of messages per site.
    """
    data = Chitchat(num_clients=4, min_messages=examples, max_messages=examples, max_held_out=32).load(Key.of(7))
    for site, examples_of_site in zip(SITES, data.clients.values(), strict=True):
        write_rows(out / f"{site}.jsonl", examples_of_site)
    write_rows(out / "held-out.jsonl", next(iter(data.held_out.values())))


def write_rows(path: Path, examples: tuple[Example, ...]) -> None:
    """Write a line for each example: the message before, and the response.

    Args:
        path: the JSONL file.
        examples: with at least two turns.
    """
    rows = ({"instruction": each.turns[-2].content, "response": each.response} for each in examples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rounds_done(run: Path) -> int:
    """Return the number of finished rounds in the run's event log."""
    return read(run).done if (run / FILE).exists() else 0


def fedferret(*words: str) -> str:
    """Run a command and return its output; exit if it fails."""
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr or done.stdout)
    return done.stdout.rstrip()


def tail(path: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


def free_port() -> int:
    """Return a port on loopback that no process has at this moment."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
