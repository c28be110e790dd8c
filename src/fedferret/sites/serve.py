"""`fedferret serve`: the processes of a federation's server, started, watched, and ended together.

    nginx (proxy) --fleet paths only--> SuperLink on loopback <--task-- server_app: the round loop, the run's folder

Flower cannot resume a run: if the SuperLink or the ServerApp ends, both are started again with a new Flower run, and
the fedferret run is resumed from its log. Sites only see a pause; their keys and nodes are in the SuperLink's database.
Only a mistake of the user and a run that cannot go on end the server. A ServerApp that ended over a site's message is
started again without it (``strikes.py``), as often as that site has strikes: it uses up no start of the others.

    RUN/server/          state for `nodes` and `status`, logs, database, the secret of SuperLink and ServerApp
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
from fedferret.data.pinned import OPTION
from fedferret.run_folder import belongs, finished_summary
from fedferret.sites import state, strikes
from fedferret.sites.address import is_loopback, split
from fedferret.sites.control import Control
from fedferret.sites.credentials import UNSIGNED, ServerCredentials
from fedferret.sites.flower_process import LOOPBACK, Certificates, check_free, environment, free_port, superlink
from fedferret.sites.members import Members
from fedferret.sites.nginx import Limits
from fedferret.sites.package import fingerprint, run_package
from fedferret.sites.proxy import Proxy, find_nginx
from fedferret.sites.strikes import AGAIN
from fedferret.sites.supervisor import HEALTHY, Part, Supervisor, alone_in, ended, terminable

LOOK = 0.2  # seconds between two polls of the processes
WRITE_EVERY = 5.0  # seconds between two records of the connected sites
STARTING = 120.0  # seconds that a SuperLink may take to start: it takes seven on an idle machine of two cores
FAILED_STARTS = 5  # after so many in a row, none serving for HEALTHY seconds, the server gives up


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of `fedferret serve`."""

    listen: str = f"{LOOPBACK}:8443"  # where sites call; default: loopback
    credentials: ServerCredentials | None = None  # None: insecure
    wait: float = 300.0  # seconds to wait for all sites before a round; a site's model takes minutes to load
    patience: float = 86400.0  # seconds without a finished round after which the server gives up: a day
    insecure_off_loopback: bool = False
    accept_changed_data: bool = False  # go on with other held-out rows than the run began with

    def __post_init__(self) -> None:
        host, _ = split(self.listen)
        if self.credentials is None and not is_loopback(host) and not self.insecure_off_loopback:
            raise UserError(
                f"--listen {self.listen} without certificates: whoever reaches the port could pose as a site or as the "
                f"server; make certificates with `fedferret pki init`, or add --insecure-off-loopback"
            )


def serve(recipe: Recipe, out: Path, settings: ServeSettings, log: Callable[[str], None] = print) -> None:
    """Serve a recipe until its run is finished.

    Args:
        recipe: with the data source "sites".
        out: the run's folder.
        settings: of the server.
        log: called with each line for the operator.
    Raises:
        UserError: for a mistake in the recipe, the settings or the credentials.
        RunError: if the run cannot go on.
        KeyboardInterrupt: on Ctrl-C or SIGTERM.
    """
    known = belongs(recipe, out)  # before the checkpoint is read: another run's may have messages of another method
    members = Members(out.resolve(), recipe)
    _keys(settings.credentials, members.names())
    if known and finished_summary(recipe, out, log) is not None:
        return
    out = out.resolve()
    with terminable(), alone_in(out / state.FOLDER, "a server"):
        write_atomically(out / state.FOLDER / "recipe.toml", recipe.to_toml())
        state.remove_damaged(out, log)
        for notice in settings.credentials.notices if settings.credentials else (UNSIGNED,):
            log(notice)
        Server(out, settings, members.names, log).run()


class Server:
    """The processes of one served run."""

    def __init__(
        self, out: Path, settings: ServeSettings, sites: Callable[[], list[str]], log: Callable[[str], None]
    ) -> None:
        """Create a server; nothing is started yet.

        Args:
            out: the run's folder.
            settings: of the server.
            sites: returns the names of the sites that may take part now.
            log: called with each line for the operator.
        """
        self.out, self.folder, self.settings, self.sites, self.log = out, out / state.FOLDER, settings, sites, log
        self.admitted: list[str] = []  # sites with a node that the SuperLink accepts
        self.refusal, self.refused = "", 0.0  # why not all sites were admitted, and when
        self.proxy: Proxy | None = None
        self.package = run_package()
        self.supervisor = Supervisor(log, lambda part, code, output: f"{part.name} {ended(code)}; starting it again.")
        self.environment = environment(self.folder / "flower")
        self.proxied = settings.credentials is not None and _has_nginx(settings)
        self.port = free_port() if self.proxied else split(settings.listen)[1]
        self.authority = settings.credentials.authority if settings.credentials else None
        self.started, self.restarts, self.written = time.time(), 0, 0.0
        self.lived = 0.0  # seconds for which the current ServerApp has run
        self.left_out = ""  # the site of the message over which the last ServerApp ended

    def run(self) -> None:
        """Serve until the run is finished or cannot go on, or until Ctrl-C."""
        os.environ.update(self.environment)  # this process calls the SuperLink too, without an HTTP proxy
        check_free(split(self.settings.listen)[1])
        self.log(f"Run package: SHA-256 {fingerprint(self.package)}; sites with this fedferret accept no other.")
        ending = "stopped"
        strikes.forget_reading(self.out)
        state.forget(self.out, state.LIMITS)
        try:
            starts, round = 0, -1
            while True:
                self.lived = 0.0
                code = self._once()
                if code == 0:
                    ending = "finished"
                    return
                if code in (1, 2):
                    ending = "failed"
                    kind = UserError if code == 2 else RunError
                    raise kind(
                        "the run cannot go on, for the reason in the line above; the run's folder can be resumed"
                    )
                self.restarts += 1
                self.left_out = self._blamed(code)
                if self.left_out:
                    continue
                # a fault of ours that comes back in the same round is none of the connection, however long it took
                before, round = round, _newest_round(self.out)
                healthy = self.lived > HEALTHY and (code == AGAIN or round != before)
                starts = 0 if healthy else starts + 1
                if starts == FAILED_STARTS:
                    ending = "failed"
                    raise RunError(f"the server ended {starts} times in a row: see {self.folder}/superlink.log")
        finally:
            self.supervisor.close()
            self._log_event(ending)

    def _blamed(self, code: int) -> str:
        """The site of the message over which the ServerApp ended by a fault of ours; "" if it ended otherwise."""
        site, count = strikes.blame(self.out, code)
        if site:
            which = f"message {count} of {site}" if count else f"a message in the name of {site} that nobody verified"
            then = (
                f"It is {strikes.unread_reason(self.out, site)}" if count >= strikes.STRIKES else "It is left out once"
            )
            self.log(f"The ServerApp {ended(code)} over {which}. {then}.")
        return site

    def _start_proxy(self) -> None:
        """Start nginx, once the ServerApp has said what sites may upload; until then there is nothing to call."""
        limits = state.read(self.out, state.LIMITS)
        credentials = self.settings.credentials
        if not self.proxied or credentials is None or not limits or self.supervisor.knows("nginx"):
            return
        address, upload = f"{LOOPBACK}:{self.port}", int(limits["upload"])
        self.proxy = Proxy(self.folder / "nginx", credentials, self.settings.listen, address, Limits(upload=upload))
        self.supervisor.start(Part("nginx", self.proxy.prepare(), self.folder / "nginx.log"))
        self.proxy.wait(lambda: self.supervisor.process("nginx") is not None)

    def _once(self) -> int:
        """Start SuperLink and ServerApp, watch them until one ends, and return the ServerApp's exit code, or AGAIN."""
        self._log_event("starting")
        certificates = _certificates(self.settings.credentials)
        host = split(self.settings.listen)[0] if self.settings.insecure_off_loopback else LOOPBACK
        command = superlink(host, self.port, self.folder, certificates)
        self.supervisor.start(Part("SuperLink", command, self.folder / "superlink.log", self.environment))
        control = Control(f"{LOOPBACK if is_loopback(host) else host}:{self.port}", self.authority)
        try:
            try:
                control.wait(STARTING, lambda: self.supervisor.process("SuperLink") is not None)
                self.admitted = []
                self._admit(control)
                run_id = control.start(self.package)
            except (RunError, httpx.HTTPError) as error:
                self.log(f"The SuperLink did not accept the run ({error}); it is started again.")
                return AGAIN
            if not self.restarts:
                self.log(f"Sites call {self.settings.listen}.")
            self.supervisor.start(Part("ServerApp", self._server_app(run_id), None, self.environment))
            return self._watch(control)
        finally:
            control.close()
            self.supervisor.stop("ServerApp", patience=30.0)
            self.supervisor.stop("SuperLink")

    def _watch(self, control: Control) -> int:
        began = time.monotonic()
        while True:
            self.lived = time.monotonic() - began
            code = self.supervisor.exit_code("ServerApp")
            if code is not None:
                if code not in (0, 1, 2):
                    self.log(f"The ServerApp {ended(code)}; it is started again, and the run is resumed from its log.")
                return code
            if self.supervisor.process("SuperLink") is None:
                self.log("The SuperLink ended; it is started again, and the run is resumed from its log.")
                return AGAIN
            self._start_proxy()
            self.supervisor.poll("nginx")
            try:
                self._admit(control)
            except httpx.HTTPError:  # the SuperLink is ending: it is started again, and called again
                pass
            except (UserError, RunError) as error:  # a file of a site that was copied by hand: the others take part
                self._say_refusal(error)
            if time.monotonic() - self.written > WRITE_EVERY:
                self._log_event("serving", control)
            time.sleep(LOOK)

    def _admit(self, control: Control) -> None:
        """Let the nodes of the run's sites call, and no others: sites come and are retired while the server runs."""
        sites, credentials = self.sites(), self.settings.credentials
        if credentials is None or sites == self.admitted or time.monotonic() < self.refused + WRITE_EVERY:
            return
        present = credentials.node_public_keys().keys() & credentials.signing_keys().keys()
        if self.proxy:
            self.proxy.configure()
        control.register(_keys(credentials, [name for name in sites if name in present]))
        control.unregister(sites)
        self.admitted = sites
        try:
            _keys(credentials, sites)
        except UserError as error:  # credentials that another machine made were not copied yet
            self.admitted = []
            self._say_refusal(error)

    def _say_refusal(self, error: Exception) -> None:
        """Log once why a site cannot be let in, and try again later."""
        self.refused = time.monotonic()
        if self.refusal != str(error):
            self.refusal = str(error)
            self.log(f"{error}. Until then the others take part.")

    def _log_event(self, doing: str, control: Control | None = None) -> None:
        """Write the state that `fedferret nodes` and `status` show."""
        self.written = time.monotonic()
        with suppress(httpx.HTTPError):  # the SuperLink is ending: it is started again, and called again
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
                "pki": str(self.settings.credentials.folder) if self.settings.credentials else "",
                "proxy": self.proxied,
                "package": fingerprint(self.package),
                "restarts": self.restarts,
            },
        )

    def _nodes(self, control: Control) -> dict[str, dict[str, object]]:
        """Every site that ever connected; of two nodes with one name, the connected one, or the newer one."""
        names = state.read(self.out, "names")
        known = sorted(control.nodes(), key=lambda node: (node.connected, node.registered))
        named = {node.name or names.get(str(node.identifier), ""): node for node in known}
        return {
            name: {"connected": node.connected, "node": str(node.identifier)} for name, node in named.items() if name
        }

    def _server_app(self, run_id: int) -> list[str]:
        module = [sys.executable, "-P", "-m", "fedferret.sites", "server_app", str(self.out)]
        known = ["--run", str(run_id), "--port", str(self.port)]
        known += ["--pki", str(self.settings.credentials.folder)] if self.settings.credentials else []
        known += ["--left-out", self.left_out] if self.left_out else []
        known += [OPTION] if self.settings.accept_changed_data else []
        return [*module, *known, "--wait", str(self.settings.wait), "--patience", str(self.settings.patience)]


def _has_nginx(settings: ServeSettings) -> bool:
    """Whether nginx is installed. A server on loopback may do without; for others UserError is raised."""
    try:
        find_nginx()
        return True
    except UserError:
        if not is_loopback(split(settings.listen)[0]):
            raise
        return False


def _keys(credentials: ServerCredentials | None, sites: list[str]) -> dict[str, bytes]:
    """The public node keys of the approved sites. Raises UserError for a site without credentials."""
    if credentials is None:
        return {}
    known = credentials.node_public_keys()
    missing = [name for name in sites if name not in known]
    if missing:
        raise UserError(f"{', '.join(missing)}: no credentials; make them with `fedferret pki issue {missing[0]}`")
    unsigned = [name for name in sites if name not in credentials.signing_keys()]
    if unsigned:
        raise UserError(
            f"{', '.join(unsigned)}: no signing keys, an earlier fedferret made the credentials; run "
            f"`fedferret pki renew {unsigned[0]}`, and send the new archive"
        )
    return {name: known[name].read_bytes() for name in sites}


def _certificates(credentials: ServerCredentials | None) -> Certificates | None:
    return Certificates(credentials.authority, *credentials.superlink) if credentials else None


def _newest_round(run: Path) -> int:
    """The newest round that any site was sent a request for; 0 if none."""
    return max((int(event.get("round", 0)) for event in state.messages(run)), default=0)
