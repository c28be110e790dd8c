"""A federation of real processes on loopback, started by the commands. No process outlives its test."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from fedferret.sites.supervisor import tie_to
from fedferret.wire import codec
from tiny_runs import rows, tiny_tables

PATIENCE = 300.0  # seconds for anything: the machine may be busy


def write_recipe(folder: Path, sites: Sequence[str], rounds: int, **changes: Any) -> Path:
    """A recipe that needs a reply from each of these sites. It names their files, so it also runs in one process."""
    people: dict[str, list[dict[str, str]]] = {}
    for row in rows():
        people.setdefault(row["who"], []).append({name: value for name, value in row.items() if name != "who"})
    files = {}
    for site, owned in zip(sites, people.values(), strict=False):
        files[site] = str(_write_rows(folder / f"{site}.jsonl", owned))
    held_out = _write_rows(folder / "held-out.jsonl", people["Dov"][:4])
    clients = {"per_round": len(sites), "min_clients": len(sites)}
    execution = {"deadline": 600.0}
    tables = tiny_tables(folder, **{"rounds": rounds, "clients": clients, "execution": execution, **changes})
    tables["data"] = {"source": "sites", "sites": list(sites), "files": files, "held_out_path": str(held_out)}
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def before_exec() -> Callable[[], None]:
    """A ``preexec_fn`` for `fedferret`: it takes SIGINT, and ends if the tests are killed."""
    tie = tie_to(os.getpid()) if sys.platform == "linux" else lambda: None

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the children of a background job would ignore it
        tie()

    return prepare


class Federation:
    """Processes of `fedferret` by name, with their output in files; ``close`` ends all of them."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **environment}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        """Run `fedferret ARGUMENTS` in the federation's folder."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-c", "from fedferret.cli import main; main()", *arguments],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before_exec(),
            )

    def output(self, name: str) -> str:
        """The output of a process so far."""
        return (self.folder / f"{name}.out").read_text()

    def wait_for(self, name: str, text: str, times: int = 1) -> None:
        """Wait until the output of a process has ``text`` so many times."""

        def found() -> bool:
            if self.output(name).count(text) >= times:
                return True
            assert self._processes[name].poll() is None, f"{name} ended:\n{self.output(name)}"
            return False

        wait(found, lambda: f"{name} never logged {text!r}:\n{self.output(name)}")

    def signal(self, name: str, number: signal.Signals) -> int:
        """Send a signal to a process started here, wait for its end, and return its exit code."""
        self._processes[name].send_signal(number)
        return self._processes[name].wait(PATIENCE)

    def end(self, name: str) -> int:
        """Wait for the end of a process started here, and return its exit code."""
        return self._processes[name].wait(PATIENCE)

    def kill(self, *marks: str) -> None:
        """Send SIGKILL to the one process of this federation with all ``marks`` in its command line."""
        (process,) = [number for number, line in self.running() if all(mark in line for mark in marks)]
        os.kill(process, signal.SIGKILL)

    def running(self) -> list[tuple[int, str]]:
        """Ids and command lines of all processes with the federation's folder in their command line or as directory."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                line = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                within = str(self.folder) in line or os.readlink(entry / "cwd") == str(self.folder)
                if entry.name.isdigit() and line and within:
                    found.append((int(entry.name), line))
        return found

    def close(self) -> None:
        """End all processes, with SIGKILL if necessary."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
        for number, _ in self.running():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in self._processes.values():
            process.wait()


class CountingProxy:
    """Passes connections on to a port and counts what crosses."""

    def __init__(self, to: int) -> None:
        self._to, self.up, self.down, self.connections = to, 0, 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.connections += 1
                try:
                    far = socket.create_connection(("127.0.0.1", self._to), timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                threading.Thread(target=self._pass, args=(near, far, "up"), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, "down"), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(piece))
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def federation(folder: Path, **environment: str) -> Iterator[Federation]:
    """A federation that is closed at the end. Tests check that no process was left before that."""
    with closing(Federation(folder, **environment)) as made:
        yield made


def wait(until: Callable[[], bool], otherwise: Callable[[], str] = lambda: "it never happened") -> None:
    """Wait until ``until()`` is true."""
    end = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def records(run: Path) -> dict[str, bytes]:
    """A run's log, file by file: equal bytes mean equal weights."""
    return {path.name: path.read_bytes() for path in sorted((run / "log").iterdir())}


def private_states(files: Iterable[Path]) -> dict[str, str]:
    """By client, a hash of its newest private state in these files: those of a run's folder, or of sites' folders."""
    newest: dict[str, tuple[int, str]] = {}
    for path in files:
        kept = codec.decode(path.read_bytes())
        client = kept.client.partition("\n")[0].rpartition("/")[2]  # sites put the run before it, and an epoch after it
        found = kept.round, hashlib.sha256(codec.encode(kept.state)).hexdigest()
        newest[client] = max(newest.get(client, found), found)
    return {client: digest for client, (_, digest) in newest.items()}


def messages(run: Path) -> list[dict[str, Any]]:
    """The server's lines about requests and responses."""
    return [json.loads(line) for line in (run / "server" / "messages.jsonl").read_text().splitlines()]


def _write_rows(path: Path, owned: Sequence[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in owned))
    return path
