"""`fedferret serve`: everything that a federation's server needs, started, watched and ended as one.

    nginx (proxy) --fleet paths only--> SuperLink on loopback <--task-- server_app: the round loop, the run's folder

Flower resumes no run: where the SuperLink or the ServerApp is gone, both are started again with a new Flower run, and
ours goes on from its log. Sites notice nothing but a pause; their keys and nodes are in the SuperLink's database.

    RUN/server/          this module's: state for `nodes` and `status`, logs, database, the secret of the two processes
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from fedferret.config import Recipe
from fedferret.core.errors import RunError, UserError
from fedferret.core.files import write_atomically
from fedferret.runner import belongs
from fedferret.sites import state
from fedferret.sites.address import is_loopback, split
from fedferret.sites.control import Control
from fedferret.sites.credentials import ServerCredentials
from fedferret.sites.flower_process import LOOPBACK, Certificates, check_free, environment, free_port, superlink
from fedferret.sites.package import fingerprint, run_package
from fedferret.sites.proxy import Proxy, find_nginx
from fedferret.sites.server_app import AGAIN, approved_sites
from fedferret.sites.supervisor import HEALTHY, Part, Supervisor, alone_in, ended, terminable
from fedferret.tracking.summary import read_summary

LOOK = 0.2  # seconds between two looks at the processes
TELL = 5.0  # seconds between two looks at who is connected
STARTING = 120.0  # seconds that a SuperLink may take to answer: seven on an idle machine of two cores
FAILED_STARTS = 5  # one after the other end the server: none of them came to serve for as long as HEALTHY


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a run is served."""

    listen: str = f"{LOOPBACK}:8443"  # where sites call; loopback unless said otherwise
    credentials: ServerCredentials | None = None  # None: insecure
    wait: float = 300.0  # seconds to wait for all sites before a round; a site's model takes minutes to load
    patience: float = 86400.0  # seconds without a finished round after which the server gives up: a night and a day
    insecure_off_loopback: bool = False

    def __post_init__(self) -> None:
        host, _ = split(self.listen)
        if self.credentials is None and not is_loopback(host) and not self.insecure_off_loopback:
            raise UserError(
                f"--listen {self.listen} without certificates: anyone who reaches the port could pose as a site and as "
                f"the server; make certificates with `fedferret pki init`, or add --insecure-off-loopback"
            )


def serve(recipe: Recipe, out: Path, settings: ServeSettings, log: Callable[[str], None] = print) -> None:
    """Serve the recipe's run in the folder ``out`` to its end. Raises UserError, RunError, KeyboardInterrupt."""
    sites = approved_sites(recipe)
    keys = _keys(settings.credentials, sites)
    if belongs(recipe, out) and read_summary(out).get("status") == "finished":
        log(f"{out} holds this run, finished: nothing to do. Another folder (--out) plays it again.")
        return
    out = out.resolve()
    with terminable(), alone_in(out / state.FOLDER, "a server"):
        write_atomically(out / state.FOLDER / "recipe.toml", recipe.to_toml())
        for notice in settings.credentials.notices if settings.credentials else ():
            log(notice)
        Server(out, settings, keys, log).play()


class Server:
    """The processes of one served run."""

    def __init__(self, out: Path, settings: ServeSettings, keys: dict[str, bytes], log: Callable[[str], None]) -> None:
        self.out, self.folder, self.settings, self.keys, self.log = out, out / state.FOLDER, settings, keys, log
        self.package = run_package()
        self.supervisor = Supervisor(log, lambda part, code, words: f"{part.name} {ended(code)}; starting it again.")
        self.environment = environment(self.folder / "flower")
        self.proxied = settings.credentials is not None and _has_nginx(settings)
        self.port = free_port() if self.proxied else split(settings.listen)[1]
        self.authority = settings.credentials.authority if settings.credentials else None
        self.started, self.restarts, self.told = time.time(), 0, 0.0
        self.lived = 0.0  # seconds for which the present ServerApp has been served

    def play(self) -> None:
        """Serve until the run is finished, cannot go on, or Ctrl-C."""
        os.environ.update(self.environment)  # this process calls the SuperLink too: by no proxy
        check_free(split(self.settings.listen)[1])
        self.log(f"Run package: SHA-256 {fingerprint(self.package)}; sites with this fedferret take no other.")
        ending = "stopped"
        try:
            if self.proxied:
                self._start_proxy()
            starts = 0
            while True:
                self.lived = 0.0
                code = self._once()
                if code == 0:
                    ending = "finished"
                    return
                if code in (1, 2):
                    ending = "failed"
                    kind = UserError if code == 2 else RunError
                    raise kind("the run cannot go on; the line above says why, and its folder can be resumed")
                self.restarts += 1
                starts = 0 if self.lived > HEALTHY else starts + 1
                if starts == FAILED_STARTS:
                    ending = "failed"
                    raise RunError(f"the server ended {starts} times in a row: {self.folder}/superlink.log may say why")
        finally:
            self.supervisor.close()
            self._log_event(ending)

    def _start_proxy(self) -> None:
        assert self.settings.credentials is not None
        proxy = Proxy(self.folder / "nginx", self.settings.credentials, self.settings.listen, f"{LOOPBACK}:{self.port}")
        self.supervisor.start(Part("nginx", proxy.prepare(), self.folder / "nginx.log"))
        proxy.wait(lambda: self.supervisor.process("nginx") is not None)

    def _once(self) -> int:
        """One life of SuperLink and ServerApp; the ServerApp's exit code, or AGAIN."""
        self._log_event("starting")
        certificates = _certificates(self.settings.credentials)
        host = split(self.settings.listen)[0] if self.settings.insecure_off_loopback else LOOPBACK
        command = superlink(host, self.port, self.folder, certificates)
        self.supervisor.start(Part("SuperLink", command, self.folder / "superlink.log", self.environment))
        control = Control(f"{LOOPBACK if is_loopback(host) else host}:{self.port}", self.authority)
        try:
            control.wait(STARTING, lambda: self.supervisor.process("SuperLink") is not None)
            control.register(self.keys)
            run = control.start(self.package)
            if not self.restarts:
                self.log(f"Sites call {self.settings.listen}.")
            self.supervisor.start(Part("ServerApp", self._server_app(run), None, self.environment))
            return self._watch(control)
        except (RunError, httpx.HTTPError) as error:
            self.log(f"The SuperLink did not take the run ({error}); it is started again.")
            return AGAIN
        finally:
            control.close()
            self.supervisor.stop("ServerApp", patience=30.0)
            self.supervisor.stop("SuperLink")

    def _watch(self, control: Control) -> int:
        began = time.monotonic()
        while True:
            self.lived = time.monotonic() - began
            code = self.supervisor.code("ServerApp")
            if code is not None:
                if code not in (0, 1, 2):
                    self.log(f"The ServerApp {ended(code)}; it is started again, and the run goes on from its log.")
                return code
            if self.supervisor.process("SuperLink") is None:
                self.log("The SuperLink is gone; it is started again, and the run goes on from its log.")
                return AGAIN
            self.supervisor.poll("nginx")
            if time.monotonic() - self.told > TELL:
                self._log_event("serving", control)
            time.sleep(LOOK)

    def _log_event(self, doing: str, control: Control | None = None) -> None:
        """Write down what `fedferret nodes` and `status` show."""
        self.told = time.monotonic()
        with suppress(httpx.HTTPError):  # a SuperLink that is ending: it is started again, and asked again
            if control:
                state.write(self.out, "nodes", {"time": time.time(), "nodes": self._nodes(control)})
        state.write(
            self.out,
            "server",
            {
                "doing": doing,
                "time": time.time(),
                "process": os.getpid(),
                "started": self.started,
                "listen": self.settings.listen,
                "secure": self.authority is not None,
                "proxy": self.proxied,
                "package": fingerprint(self.package),
                "restarts": self.restarts,
            },
        )

    def _nodes(self, control: Control) -> dict[str, dict[str, object]]:
        """The sites that were ever here; of two nodes with one name the one that is connected, or the newer."""
        names = state.read(self.out, "names")
        known = sorted(control.nodes(), key=lambda node: (node.connected, node.registered))
        named = {node.name or names.get(str(node.identifier), ""): node for node in known}
        return {
            name: {"connected": node.connected, "node": str(node.identifier)} for name, node in named.items() if name
        }

    def _server_app(self, run: int) -> list[str]:
        module = [sys.executable, "-P", "-m", "fedferret.sites.server_app", str(self.out)]
        known = ["--run", str(run), "--port", str(self.port)]
        known += ["--authority", str(self.authority)] if self.authority else []
        return [*module, *known, "--wait", str(self.settings.wait), "--patience", str(self.settings.patience)]


def _has_nginx(settings: ServeSettings) -> bool:
    """Whether nginx stands in front. On loopback it may be left out, for there is nobody to keep out."""
    try:
        find_nginx()
        return True
    except UserError:
        if not is_loopback(split(settings.listen)[0]):
            raise
        return False


def _keys(credentials: ServerCredentials | None, sites: list[str]) -> dict[str, bytes]:
    """The approved sites' public keys. Raises UserError for a site that none were made for."""
    if credentials is None:
        return {}
    known = credentials.node_public_keys()
    missing = [name for name in sites if name not in known]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no credentials there; make them with `fedferret pki issue {missing[0]}`"
        )
    return {name: known[name].read_bytes() for name in sites}


def _certificates(credentials: ServerCredentials | None) -> Certificates | None:
    return Certificates(credentials.authority, *credentials.superlink) if credentials else None
