"""`fedferret join`: everything that a site needs to take part, started, watched and started again when it ends.

trainer    model, data, replica; behind a socket in the site's folder      (`engines/resident.py`)
relay      takes letters from the SuperNode to the trainer                 (`client_app.py`)
SuperNode  Flower's half, calls the server; nothing calls this machine
forwarder  shows the site's certificate to the server                      (`forwarder.py`; not in insecure mode)

SITE/site.toml       name and data file; what else can be set: `engines/site.py`
     credentials/    what the server's administrator sent
     runs/           per run: recipe, log and private state, all that a restarted trainer needs
     audit.jsonl     every message that came and went
     logs/, flower/  the processes' words, and Flower's own files
"""

from __future__ import annotations

import json
import os
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import write_atomically
from fedferret.engines.relay import SOCKET
from fedferret.sites import forwarder
from fedferret.sites.address import is_loopback, split
from fedferret.sites.credentials import SiteCredentials, check_name, private_folder, read_site, unpack
from fedferret.sites.flower_process import LOOPBACK, environment, free_port, secret, supernode
from fedferret.sites.package import fingerprint, run_package
from fedferret.sites.supervisor import Part, Supervisor, alone_in, ended, terminable

LOOK = 0.2  # seconds between two looks at the processes
NOT_ACTIVATED = "[code: 2004]"  # Flower's words for a node that it does not let in (`flwr/supercore/error/catalog.py`)
SETTINGS = "site.toml"  # read by the trainer, `engines/site.py`
STATE = "join.json"


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """How a site takes part."""

    address: str  # of the server, HOST:PORT
    name: str  # as the run's list of sites has it
    data: Path | None = None  # None: as in site.toml
    folder: Path  # the site's own
    credentials: Path | None = None  # folder or archive; None: those in the folder already
    insecure: bool = False
    insecure_off_loopback: bool = False
    package: str = ""  # SHA-256 of another run package to take; "": the one that this fedferret makes

    def __post_init__(self) -> None:
        host, _ = split(self.address)
        check_name(self.name)
        if self.insecure and not is_loopback(host) and not self.insecure_off_loopback:
            raise UserError(
                f"--insecure to {self.address}: anyone on the way could pose as the server; use --credentials, or add "
                f"--insecure-off-loopback"
            )


def join(settings: JoinSettings, log: Callable[[str], None] = print) -> None:
    """Take part until Ctrl-C. Raises UserError, RunError, KeyboardInterrupt."""
    folder = settings.folder.resolve()
    with terminable():
        private_folder(folder)
        with alone_in(folder, "a site"):
            known = None if settings.insecure else _credentials(settings, folder)
            for notice in known.notices if known else ():
                log(notice)
            log(f"{settings.name} trains on {resolve_data(settings, folder)}, which stays where it is.")
            log(f"Everything of this site is in {folder}; every message that comes or goes: audit.jsonl there.")
            Site(settings, folder, known, log).play()


def resolve_data(settings: JoinSettings, folder: Path) -> str:
    """The site's data file, as ``site.toml`` has it; that is written where there is none. Raises UserError for options
    that it contradicts."""
    import tomli_w

    path = folder / SETTINGS
    given = str(settings.data.resolve()) if settings.data else None
    if not path.exists():
        if given is None:
            raise UserError(f"--data is missing: {path} is not there yet to say which file {settings.name} trains on")
        write_atomically(path, tomli_w.dumps({"name": settings.name, "data": {"path": given}}))
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8"))
        name, data = str(known["name"]), str(folder / Path(known["data"]["path"]).expanduser())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: must hold a name and a table [data] with a path ({error})") from None
    if name != settings.name:
        raise UserError(f'{folder} is the folder of "{name}": give --folder another one for {settings.name}')
    if given is not None and Path(data).resolve() != Path(given):
        raise UserError(f"--data {given}: {path} says {data}; change it there, or leave --data out")
    return data


class Site:
    """The processes of one site."""

    def __init__(
        self, settings: JoinSettings, folder: Path, credentials: SiteCredentials | None, log: Callable[[str], None]
    ) -> None:
        self.settings, self.folder, self.credentials, self.log = settings, folder, credentials, log
        self.supervisor = Supervisor(log, self._explain)
        self.port, self.forwarding = free_port(), free_port()
        self.connected, self.started = 0, time.time()  # the id of the SuperNode's process that said it is connected

    def play(self) -> None:
        """Keep the processes running until Ctrl-C."""
        try:
            self._start_trainer()
            for part in self._parts():
                self.supervisor.start(part)
            while True:
                self._check_trainer()
                self.supervisor.poll()
                self._greet()
                time.sleep(LOOK)
        finally:
            self.supervisor.close()
            self._log_event("stopped")

    def _start_trainer(self) -> None:
        """Start the trainer and wait until it is ready: a site whose data is of no use meets no server."""
        command = [sys.executable, "-P", "-m", "fedferret.engines.resident", str(self.folder)]
        self.supervisor.start(Part("trainer", command, self.folder / "logs" / "trainer.log"))
        while "ready\n" not in self.supervisor.words("trainer"):
            code = self.supervisor.code("trainer")
            if code is not None:
                self._check_trainer()
                raise RunError(f"the trainer {ended(code)}; {self.folder}/logs/trainer.log says why")
            time.sleep(LOOK)

    def _check_trainer(self) -> None:
        """A trainer that ends for a mistake of the user's would end so again."""
        if self.supervisor.code("trainer") == 2:
            words = self.supervisor.words("trainer").strip().splitlines() or ["the trainer refused its folder"]
            raise UserError(words[-1].removeprefix("fedferret: "))

    def _parts(self) -> list[Part]:
        logs, flower = self.folder / "logs", self.folder / "flower"
        quiet = environment(flower)
        parts, server, authority, key = [], self.settings.address, None, None
        if self.credentials:
            command = forwarder.command(self.credentials, self.settings.address, self.forwarding, self.folder)
            parts.append(Part("forwarder", command, logs / "forwarder.log"))
            server, authority = f"{LOOPBACK}:{self.forwarding}", self.credentials.folder / "loopback.crt"
            key = self.credentials.node_key
        node = supernode(server, self.port, flower, authority, key, self.settings.name, self.folder / SOCKET)
        parts.append(Part("SuperNode", node, logs / "supernode.log", quiet))
        secret(flower)
        package = self.settings.package or fingerprint(run_package())
        relay = [sys.executable, "-P", "-m", "fedferret.sites.client_app", "--port", str(self.port)]
        relay += ["--secret", str(flower / "secret"), "--package", package]
        return [*parts, Part("relay", relay, logs / "relay.log", quiet)]

    def _greet(self) -> None:
        """Say that the server let this site in, once for each time."""
        process = self.supervisor.process("SuperNode")
        if process and process != self.connected and "SuperNode ID" in self.supervisor.words("SuperNode"):
            self.connected = process
            self.log(f"{self.settings.name} is connected to {self.settings.address}. Ctrl-C ends it.")
            self._log_event("connected")

    def _explain(self, part: Part, code: int, words: str) -> str:
        if part.name == "SuperNode" and NOT_ACTIVATED in words:
            return (
                f"{self.settings.address} does not let {self.settings.name} in yet: after a cut it holds the old "
                f"connection for up to a minute, or this site is not on the run's list; trying again."
            )
        return f"The {part.name} {ended(code)}; starting it again."

    def _log_event(self, doing: str) -> None:
        content = {"doing": doing, "time": time.time(), "process": os.getpid(), "started": self.started}
        content |= {"address": self.settings.address, "name": self.settings.name, "secure": bool(self.credentials)}
        write_atomically(self.folder / STATE, json.dumps(content, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """What the site's `join` last wrote of itself."""
    known: dict[str, Any] = json.loads((folder / STATE).read_text())
    return known


def _credentials(settings: JoinSettings, folder: Path) -> SiteCredentials:
    given, own = settings.credentials, folder / "credentials"
    if given is None and not own.exists():
        raise UserError("no certificates: give the archive that the server's administrator sent with --credentials")
    if given is not None and not given.exists():
        raise UserError(f"--credentials {given}: there is no such file or folder")
    known = unpack(given, own) if given is not None and given.is_file() else read_site(given or own)
    if known.name != settings.name:
        raise UserError(f"--name {settings.name}: these are the credentials of {known.name}")
    return known
