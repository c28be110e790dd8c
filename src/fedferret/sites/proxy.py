"""The proxy: nginx at the only port that is open to the network. Sites with a certificate reach the calls of a node.

    site --TLS, both certificates checked--> nginx --TLS on loopback--> SuperLink's one port
                                               |  /v1/fleet/..., the ten calls of a node: passed on
                                               +  /v1/control, /v1/runtime, all else: 404, never passed on

The configuration is in ``nginx.py``. nginx runs from a separate folder (configuration, process id, logs) and as an
ordinary user; if root starts the server, nginx's workers run as ``nobody``. ``watchdog.py`` ends nginx with the server
and makes nginx read replaced files again.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import TracebackType

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import write_atomically
from fedferret.sites.credentials import ServerCredentials, private_folder
from fedferret.sites.nginx import Limits, configuration


class Proxy:
    """nginx in front of SuperLink; as a context manager, it runs nginx."""

    def __init__(
        self, folder: Path, server: ServerCredentials, listen: str, superlink: str, limits: Limits | None = None
    ) -> None:
        """Create a proxy; nothing is started yet.

        Args:
            folder: for nginx's configuration, process id and logs.
            server: the server's credentials.
            listen: where sites call, ADDRESS:PORT.
            superlink: the SuperLink on loopback, ADDRESS:PORT.
            limits: for sites.
        Raises:
            UserError: for an invalid address, or a SuperLink that is not on loopback.
        """
        self.folder, self._server, self._limits = folder.resolve(), server, limits or Limits()
        self._listen, self._superlink = _address(listen), _address(superlink)
        if not self._superlink[0].is_loopback:
            raise UserError(
                f"SuperLink at {superlink}: keep it on loopback, so that nobody else reaches its control paths"
            )
        self._process: subprocess.Popen[bytes] | None = None
        self._logged = 0  # bytes of the log from earlier starts

    def prepare(self) -> list[str]:
        """Write the configuration, have nginx check it, and return the proxy's command.

        Raises:
            UserError: if nginx is missing or refuses the configuration.
        """
        nginx = find_nginx()
        private_folder(self.folder)
        (self.folder / "temporary").mkdir(exist_ok=True)
        path = self.configure()
        outcome = subprocess.run(
            [nginx, "-t", "-q", "-p", str(self.folder), "-c", str(path)], capture_output=True, text=True
        )
        if outcome.returncode:
            raise UserError(f"nginx refuses its configuration {path}: {_last_error(outcome.stderr)}")
        (self.folder / "nginx.pid").unlink(missing_ok=True)
        log = self.folder / "error.log"
        self._logged = log.stat().st_size if log.exists() else 0
        watched = [self._server.revocations, *self._server.proxy, self._server.superlink[0], path]
        return [sys.executable, "-P", "-m", "fedferret.sites.watchdog", nginx, str(path), *map(str, watched)]

    def configure(self) -> Path:
        """Write the configuration and return its path; a running nginx reads it within seconds.

        It has the node key of each site in the folder of `fedferret pki`.

        Raises:
            UserError: for a path that nginx cannot read from its configuration, or a node key that is damaged.
        """
        path, listen, superlink = self.folder / "nginx.conf", _written(*self._listen), _written(*self._superlink)
        write_atomically(path, configuration(self.folder, listen, superlink, self._server, self._limits))
        return path

    def wait(self, running: Callable[[], bool], patience: float = 60.0) -> None:
        """Wait until the port takes connections.

        Args:
            running: returns whether nginx's process runs.
            patience: how long to wait, in seconds.
        Raises:
            RunError: if nginx ends, or takes no connection in time.
        """
        end = time.monotonic() + patience
        while not self.is_open():
            if not running() or time.monotonic() > end:
                raise RunError(f"nginx takes no connection on {_written(*self._listen)}: {self.last_error()}")
            time.sleep(0.05)

    def is_open(self) -> bool:
        """Return whether nginx, and no other process, has the port and takes connections."""
        pid = self.folder / "nginx.pid"  # nginx writes it once it has the port
        if not (pid.exists() and pid.read_text().strip()):
            return False
        address, port = self._listen
        nearest = ip_address("::1" if address.version == 6 else "127.0.0.1") if address.is_unspecified else address
        try:
            socket.create_connection((str(nearest), port), timeout=5).close()
        except OSError:
            return False
        return True

    def last_error(self) -> str:
        """Return the last error that nginx logged since ``prepare``."""
        log = self.folder / "error.log"
        return _last_error(log.read_bytes()[self._logged :].decode(errors="replace") if log.exists() else "")

    def __enter__(self) -> Proxy:
        command = self.prepare()
        with (self.folder / "error.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        process = self._process
        try:
            self.wait(lambda: process.poll() is None)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End nginx, and wait until the port is free."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)  # the watchdog kills an nginx that takes longer than a quarter of this
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find_nginx() -> str:
    """Return the path of the nginx program.

    Raises:
        UserError: if nginx is not installed.
    """
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")
    if found is None:
        raise UserError("nginx is not installed; on Debian and Ubuntu: apt-get install nginx-light")
    return found


def _address(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    host, _, port = text.rpartition(":")
    try:
        address = ip_address(host.strip("[]"))
        number = int(port)
        if not 0 < number < 1 << 16:
            raise ValueError
    except ValueError:
        raise UserError(f'"{text}": give an IP address and a port, as in 0.0.0.0:8443 or [::]:8443') from None
    return address, number


def _written(address: IPv4Address | IPv6Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "still could not bind" not in line]  # the line before has the reason
    lines = [line for line in lines if "[emerg]" in line] or lines or ["its log is empty"]
    return lines[-1].removeprefix("nginx: ").strip()
