"""Four hospitals on one machine: real processes, real certificates, a site and the server killed on the way.

    python examples/four-hospitals/run.py [--tiny] [--out FOLDER]

    certificates -> server (nginx, SuperLink, ServerApp) -> four sites, each a process tree with a data file of its own
    after round 1 ward-3 is killed and started again; after round 3 the server is; the run ends with a report

It shows what an operator would do by hand, by the commands that an operator would give: docs/deployment.md explains
each. The wards' texts are four groups of real people's messages (chitchat-dataset); no ward sees another's. With
``--tiny`` the random model of 90,624 weights takes SmolLM2's place: a minute or two instead of ten.
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
WARDS = ("ward-1", "ward-2", "ward-3", "ward-4")
COMMAND = [str(Path(sys.executable).with_name("fedferret"))]
LONGEST = 840.0  # seconds that all of this may take


@dataclass
class Federation:
    """The processes of this example; each writes into a file of its own under ``out``."""

    out: Path
    port: int
    settings: list[str]  # --set ... of the recipe
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.out / "run"

    def start(self, name: str) -> None:
        """Start the server or a ward, or start it again: the command is the same."""
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
        """As a power cut would: SIGKILL, without a word. What it had started ends with it."""
        self.processes[name].kill()
        self.processes[name].wait()

    def wait(self, what: str, reached: Callable[[], bool]) -> None:
        """Wait until ``reached``; a server that has ended will not reach anything."""
        while not reached():
            if self.processes["server"].poll() not in (None, 0):
                sys.exit(f"the server ended before {what}; its last words:\n{tail(self.out / 'server.log')}")
            if time.monotonic() - self.began > LONGEST:
                sys.exit(f"{LONGEST:.0f} seconds were not enough for {what}; {self.out} has everybody's log")
            time.sleep(0.5)

    def log(self, text: str) -> None:
        """A line with the time since the start."""
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def close(self) -> None:
        """End everything that is left, in order."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    """All of it, from nothing to a report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model of 90,624 weights instead of SmolLM2")
    parser.add_argument("--out", type=Path, default=Path("runs/four-hospitals"), help="where everything goes")
    arguments = parser.parse_args()
    try:
        find_nginx()
    except UserError as error:
        sys.exit(str(error))
    out = arguments.out.resolve()
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty: give another folder with --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    with federation(out, arguments.tiny) as all_of_it:
        play(all_of_it)


@contextmanager
def federation(out: Path, tiny: bool) -> Iterator[Federation]:
    """Files and certificates made; processes ended at the end, however it comes."""
    write_data(out, 64 if tiny else 200)
    settings = ["--set", f"data.held_out_path={out / 'held-out.jsonl'}"]
    if tiny:
        settings += ["--set", "model.name=tiny", "--set", "algorithm.coordinates=1024"]
    all_of_it = Federation(out, free_port(), settings)
    all_of_it.log(f"Certificates of the server and four wards go to {out / 'pki'}.")
    fedferret("pki", "init", "--host", "127.0.0.1", "--pki", str(out / "pki"))
    for ward in WARDS:
        fedferret("pki", "issue", ward, "--pki", str(out / "pki"))
    try:
        yield all_of_it
    finally:
        all_of_it.close()


def play(all_of_it: Federation) -> None:
    """The run with its two accidents."""
    for name in ("server", *WARDS):
        all_of_it.start(name)
    all_of_it.log(f"The server and {len(WARDS)} wards are starting; their logs are in {all_of_it.out}.")
    all_of_it.wait("round 1", lambda: rounds_done(all_of_it.run) >= 1)
    all_of_it.kill("ward-3")
    all_of_it.log("Round 1 is done. ward-3 was killed; the others go on.")
    all_of_it.wait("round 2", lambda: rounds_done(all_of_it.run) >= 2)
    all_of_it.start("ward-3")
    all_of_it.log("Round 2 is done without ward-3, which starts again: it will be sent what it missed.")
    all_of_it.wait("round 3", lambda: rounds_done(all_of_it.run) >= 3)
    all_of_it.kill("server")
    all_of_it.log("Round 3 is done. The server was killed, and starts again; it goes on from its log.")
    all_of_it.start("server")
    all_of_it.wait("the end", lambda: all_of_it.processes["server"].poll() == 0)
    all_of_it.log("The run is finished.")
    print(fedferret("status", str(all_of_it.run)))
    print(fedferret("nodes", str(all_of_it.run)))
    run = read(all_of_it.run)
    for number, each in sorted(run.rounds.items()):
        lost = ", ".join(f"{failure.client}: {failure.reason}" for failure in each.failures)
        print(f"round {number}: {len(each.bytes_up)} of {len(each.clients)} answered{f' ({lost})' if lost else ''}")
    losses = [evaluation.loss for _, evaluation in sorted(run.evaluations.items())]
    print(f"held-out loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"Report: {all_of_it.run / 'report.html'}")


def write_data(out: Path, examples: int) -> None:
    """A file for each ward and one for the server, of messages that no two of them share."""
    data = Chitchat(num_clients=4, min_messages=examples, max_messages=examples, max_held_out=32).load(Key.of(7))
    for ward, held in zip(WARDS, data.clients.values(), strict=True):
        write_rows(out / f"{ward}.jsonl", held)
    write_rows(out / "held-out.jsonl", next(iter(data.held_out.values())))


def write_rows(path: Path, examples: tuple[Example, ...]) -> None:
    """A line for each example: what was said before, and the answer."""
    rows = ({"instruction": each.turns[-2].content, "response": each.response} for each in examples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rounds_done(run: Path) -> int:
    """Rounds that the run's diary has so far."""
    return read(run).done if (run / FILE).exists() else 0


def fedferret(*words: str) -> str:
    """A command's words; it must succeed."""
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr or done.stdout)
    return done.stdout.rstrip()


def tail(path: Path) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
