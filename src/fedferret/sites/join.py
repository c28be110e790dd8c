"""`fedferret join`: the processes of a site, started, watched, and started again when they end.

trainer    model, data, replica; behind a socket in the site's folder      (`resident.py`; insecure: `resident/`)
relay      takes messages from the SuperNode to the trainer                (`client_app.py`)
SuperNode  Flower's process, calls the server; nothing calls this machine
forwarder  shows the site's certificate to the server                      (`forwarder.py`; not in insecure mode)

SITE/site.toml       name and data file; further settings: `sites/site.py`
     credentials/    from the server's administrator
     runs/           per run: recipe, log and private state, all that a restarted trainer needs
     audit.jsonl     a line for every message received or sent
     logs/, flower/  the processes' logs, and Flower's files
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import write_atomically
from fedferret.core.text import plain_line
from fedferret.engines.relay import SOCKET, UNLISTED
from fedferret.recipe_file import read_toml
from fedferret.resident.pins import forget_data
from fedferret.sites import forwarder
from fedferret.sites.address import is_loopback, split
from fedferret.sites.archive import unpack
from fedferret.sites.credentials import UNSIGNED, SiteCredentials, check_name, private_folder, read_site
from fedferret.sites.flower_process import LOOPBACK, environment, free_port, secret, supernode
from fedferret.sites.package import fingerprint, run_package
from fedferret.sites.state import read_json
from fedferret.sites.supervisor import Part, Supervisor, alone_in, ended, terminable

LOOK = 0.2  # seconds between two polls of the processes
LOOK_REFUSED = 2.0  # seconds between two looks at whether a connected SuperNode was refused
NOT_ACTIVATED = "[code: 2004]"  # Flower's code for a node that it refuses (`flwr/supercore/error/catalog.py`)
CONNECTED = "SuperNode ID"  # of its output, once the server accepted it
NOT_CERTIFIED = "400 Bad Request"  # the proxy's response to a certificate that it refuses
NOT_SIGNED = "401 Unauthorized"  # of a call with a signature that Flower refuses, by its time for instance
SIGNED_BEFORE, SIGNED_AHEAD = 305, 5  # seconds, of Flower's (`flwr/superlink/routers/fleet/node_auth.py`); measured
SETTINGS = "site.toml"  # read by the trainer, `sites/site.py`
STATE = "join.json"


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """The settings of `fedferret join`."""

    address: str  # of the server, HOST:PORT
    name: str  # as the run's list of sites has it
    data: Path | None = None  # None: as in site.toml
    folder: Path  # of the site
    credentials: Path | None = None  # folder or archive; None: those in the site's folder
    insecure: bool = False
    insecure_off_loopback: bool = False
    package: str = ""  # SHA-256 of the run package to accept; "": the one that this fedferret makes
    accept_changed_data: bool = False  # take the data as it is, though site.toml has pinned another content

    def __post_init__(self) -> None:
        host, _ = split(self.address)
        check_name(self.name)
        if self.insecure and not is_loopback(host) and not self.insecure_off_loopback:
            raise UserError(
                f"--insecure to {self.address}: anyone in between could pose as the server; use --credentials, or add "
                f"--insecure-off-loopback"
            )


def join(settings: JoinSettings, log: Callable[[str], None] = print) -> None:
    """Take part in a run until Ctrl-C.

    Args:
        settings: of the site.
        log: called with each line for the operator.
    Raises:
        UserError: for a mistake in the settings, the credentials or the data.
        RunError: if the trainer does not start.
        KeyboardInterrupt: on Ctrl-C or SIGTERM.
    """
    folder = settings.folder.resolve()
    with terminable():
        private_folder(folder)
        with alone_in(folder, "a site"), ExitStack() as stack:
            known = None if settings.insecure else _credentials(settings, folder)
            accept = stack.enter_context(unless_accepted(folder / SETTINGS))
            data = resolve_data(settings, folder)
            if settings.accept_changed_data:
                forget_data(folder)
            for notice in known.notices if known else (UNSIGNED,):
                log(notice)
            log(f"{settings.name} trains on {data}; the data stays there.")
            log(f"The site's folder is {folder}; audit.jsonl there has a line for every message received or sent.")
            Site(settings, folder, known, log).run(accept)


def resolve_data(settings: JoinSettings, folder: Path) -> str:
    """Return the site's data file, from ``site.toml``; write ``site.toml`` where it is missing.

    Until the site has taken part in a run, another ``--data`` replaces the file that an earlier `join` wrote down.

    Args:
        settings: of the site.
        folder: the site's folder.
    Raises:
        UserError: if ``site.toml`` is invalid or contradicts the settings.
    """
    import tomli_w

    path = folder / SETTINGS
    given = str(settings.data.resolve()) if settings.data else None
    if not path.exists():
        if given is None:
            raise UserError(
                f"--data is missing: {path} does not exist yet; give the file that {settings.name} trains on"
            )
        write_atomically(path, tomli_w.dumps({"name": settings.name, "data": {"path": given}}))
    known = read_toml(path, "write it again")
    try:
        name, data = str(known["name"]), str(folder / Path(known["data"]["path"]).expanduser())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: give a name and a table [data] with a path ({error})") from None
    if name != settings.name:
        raise UserError(f'{folder} is the folder of "{name}": give another one for {settings.name} with --folder')
    if given is None or Path(data).resolve() == Path(given):
        return data
    if any(folder.glob("runs/*")) or known["data"] != {"path": known["data"]["path"]}:
        raise UserError(f"--data {given}: {path} has {data}; change it there, or omit --data")
    others = {name: value for name, value in known.items() if name != "files"}
    write_atomically(path, tomli_w.dumps({**others, "data": {"path": given}}))
    return given


@contextmanager
def unless_accepted(path: Path) -> Iterator[Callable[[], None]]:
    """Put a file back as it was, or remove it if it is new, unless its new content was accepted.

    Args:
        path: of the file.
    Returns:
        A context manager with the function to call once the content is accepted.
    """
    before, accepted = path.read_bytes() if path.is_file() else None, list[bool]()
    try:
        yield lambda: accepted.append(True)
    finally:
        if not accepted and path.is_file():
            if before is None:
                path.unlink()
            elif before != path.read_bytes():
                write_atomically(path, before)


class Site:
    """The processes of one site."""

    def __init__(
        self, settings: JoinSettings, folder: Path, credentials: SiteCredentials | None, log: Callable[[str], None]
    ) -> None:
        """Create a site; nothing is started yet.

        Args:
            settings: of the site.
            folder: the site's folder.
            credentials: checked; None: insecure.
            log: called with each line for the operator.
        """
        self.settings, self.folder, self.credentials, self.log = settings, folder, credentials, log
        self.supervisor = Supervisor(log, self._explain)
        self.port, self.forwarding = free_port(), free_port()
        self.told = 0  # id of the relay's process that was told last that this site is not on the list
        self.looked = 0.0  # when the connected SuperNode's output was read last
        self.connected, self.started = 0, time.time()  # id of the SuperNode's process that connected last

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Keep the processes running until Ctrl-C.

        Args:
            on_ready: called once the trainer has read and accepted the data.
        """
        try:
            self._start_trainer()
            on_ready()
            for part in self._parts():
                self.supervisor.start(part)
            while True:
                self._check_trainer()
                self.supervisor.poll()
                self._log_connection()
                self._log_unlisted()
                self._end_refused()
                time.sleep(LOOK)
        finally:
            self.supervisor.close()
            self._log_event("stopped")

    def _start_trainer(self) -> None:
        """Start the trainer and wait until it is ready, so that a site with invalid data never calls the server."""
        known = self.credentials
        module = "fedferret.sites.resident" if known else "fedferret.resident"
        command = [sys.executable, "-P", "-m", module, str(self.folder), *([str(known.folder)] if known else [])]
        self.supervisor.start(Part("trainer", command, self.folder / "logs" / "trainer.log"))
        while "ready\n" not in self.supervisor.output("trainer"):
            code = self.supervisor.exit_code("trainer")
            if code is not None:
                self._check_trainer()
                raise RunError(f"the trainer {ended(code)}; see {self.folder}/logs/trainer.log")
            time.sleep(LOOK)

    def _check_trainer(self) -> None:
        """Raise UserError if the trainer ended for a mistake of the user: it would end so again."""
        if self.supervisor.exit_code("trainer") == 2:
            lines = self.supervisor.output("trainer").strip().splitlines() or ["the trainer refused its folder"]
            raise UserError(lines[-1].removeprefix("fedferret: "))

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
        relay = [sys.executable, "-P", "-m", "fedferret.sites", "client_app", "--port", str(self.port)]
        relay += ["--secret", str(flower / "secret"), "--package", package]
        return [*parts, Part("relay", relay, logs / "relay.log", quiet)]

    def _log_connection(self) -> None:
        """Log that the server accepted this site, once for each SuperNode process."""
        process = self.supervisor.process("SuperNode")
        if process and process != self.connected and CONNECTED in self.supervisor.output("SuperNode"):
            self.connected = process
            self.log(f"{self.settings.name} is connected to {self.settings.address}. Ctrl-C ends it.")
            self._log_event("connected")

    def _log_unlisted(self) -> None:
        """Log what a server in insecure mode says of a name that it does not know, once for each relay process."""
        process = self.supervisor.process("relay")
        if not process or process == self.told:
            return
        told = [line for line in self.supervisor.output("relay").splitlines() if line.startswith(UNLISTED)]
        if told:
            self.told = process
            self.log(
                f"{self.settings.address} does not ask this site: {plain_line(told[-1].removeprefix(UNLISTED))}; "
                f"give --name as the recipe has it, or have the server's operator add it; waiting."
            )

    def _end_refused(self) -> None:
        """End a SuperNode with a certificate that the server refuses: Flower's calls no more then, and does not end."""
        process, now = self.supervisor.process("SuperNode"), time.monotonic()
        if not process or process != self.connected or now < self.looked + LOOK_REFUSED:
            return
        self.looked = now
        if NOT_CERTIFIED in self.supervisor.output("SuperNode"):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    def _explain(self, part: Part, code: int, output: str) -> str:
        return explain(self.settings, part.name, code, output)

    def _log_event(self, doing: str) -> None:
        content = {"doing": doing, "time": time.time(), "process": os.getpid(), "started": self.started}
        content |= {"address": self.settings.address, "name": self.settings.name, "secure": bool(self.credentials)}
        write_atomically(self.folder / STATE, json.dumps(content, indent=1))


def explain(settings: JoinSettings, process: str, code: int, output: str) -> str:
    """Return a line for the operator on a process of the site that ended.

    Args:
        settings: of the site.
        process: its name.
        code: its exit code.
        output: the last that it printed.
    """
    if process == "SuperNode" and NOT_ACTIVATED in output:
        return (
            f"{settings.address} refuses {settings.name} for now: it holds a lost connection for up to a minute, or "
            f"this site is not on the run's list of sites; trying again."
        )
    if process == "SuperNode" and NOT_CERTIFIED in output:
        return (
            f"{settings.address} refuses the certificate of {settings.name}: it was revoked, as a retired site's is, "
            f"or has expired; ask the server's administrator; trying again."
        )
    if process == "SuperNode" and NOT_SIGNED in output and CONNECTED in output:
        return f"{settings.address} does not know this connection: it serves another run now; connecting again."
    if process == "SuperNode" and NOT_SIGNED in output:
        return (
            f"{settings.address} refuses the signatures of {settings.name} (401): set this machine's clock and the "
            f"server's, for instance with chrony; calls may be signed at most {SIGNED_BEFORE} s before they arrive, "
            f"and at most {SIGNED_AHEAD} s ahead; trying again."
        )
    return f"The {process} {ended(code)}; starting it again."


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `join` last wrote about itself in the site's folder. Raises UserError if the file is damaged."""
    return read_json(folder / STATE, "`fedferret join`")


def _credentials(settings: JoinSettings, folder: Path) -> SiteCredentials:
    given, stored = settings.credentials, folder / "credentials"
    if given is None and not stored.exists():
        raise UserError("no certificates: give the archive from the server's administrator with --credentials")
    if given is not None and not given.exists():
        raise UserError(f"--credentials {given}: there is no such file or folder")
    if given is not None and given.is_file():
        return unpack(given, stored, name=settings.name)
    known = read_site(given or stored)
    if known.name != settings.name:
        raise UserError(
            f"--name {settings.name}: the credentials are those of {known.name}; give those of {settings.name}"
        )
    return known
