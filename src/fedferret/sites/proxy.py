"""The one port that is open to the outside: nginx, which lets certified sites reach what Flower's nodes need.

    site --TLS, both certificates checked--> nginx --TLS on loopback--> SuperLink's one port
                                               |  /v1/fleet/..., the ten calls of a node: passed on
                                               +  /v1/control, /v1/runtime, all else: 404, never passed on

What it is told is in ``nginx.py``. It runs from a folder of its own (configuration, process id, logs) and as an
ordinary user; where the server is started by root, its workers are ``nobody``. ``keeper.py`` sees to it that it ends
when it should and reads replaced files again.
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
    """nginx in front of SuperLink; as a context manager, running."""

    def __init__(
        self, folder: Path, server: ServerCredentials, listen: str, superlink: str, limits: Limits | None = None
    ) -> None:
        """``folder``: nginx's own; ``listen``: ADDRESS:PORT for sites to call; ``superlink``: ADDRESS:PORT on loopback.

        Raises :class:`UserError` for what nginx could not take.
        """
        self.folder, self._server, self._limits = folder.resolve(), server, limits or Limits()
        self._listen, self._superlink = _address(listen), _address(superlink)
        if not self._superlink[0].is_loopback:
            raise UserError(f"SuperLink at {superlink}: keep it on loopback, where nobody reaches its control paths")
        self._process: subprocess.Popen[bytes] | None = None
        self._logged = 0  # bytes in the log before this start

    def prepare(self) -> list[str]:
        """Write the configuration and have nginx check it; the command that runs the proxy and ends with its starter.

        Raises :class:`UserError` where nginx is missing or refuses the configuration.
        """
        nginx = find_nginx()
        private_folder(self.folder)
        (self.folder / "temporary").mkdir(exist_ok=True)
        path = self.folder / "nginx.conf"
        listen, superlink = _written(*self._listen), _written(*self._superlink)
        write_atomically(path, configuration(self.folder, listen, superlink, self._server, self._limits))
        outcome = subprocess.run(
            [nginx, "-t", "-q", "-p", str(self.folder), "-c", str(path)], capture_output=True, text=True
        )
        if outcome.returncode:
            raise UserError(f"nginx refuses its configuration {path}: {_last_words(outcome.stderr)}")
        (self.folder / "nginx.pid").unlink(missing_ok=True)
        log = self.folder / "error.log"
        self._logged = log.stat().st_size if log.exists() else 0
        watched = [self._server.revocations, *self._server.proxy, self._server.superlink[0]]
        return [sys.executable, "-P", "-m", "fedferret.sites.watchdog", nginx, str(path), *map(str, watched)]

    def wait(self, running: Callable[[], bool], patience: float = 60.0) -> None:
        """Wait until the port answers.

        Raises :class:`RunError` after ``patience`` seconds, or once ``running`` says no.
        """
        end = time.monotonic() + patience
        while not self.answers():
            if not running() or time.monotonic() > end:
                raise RunError(f"nginx does not answer on {_written(*self._listen)}: {self.words()}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether nginx, and no other process, has the port, and takes connections."""
        pid = self.folder / "nginx.pid"  # written once the port is its own
        if not (pid.exists() and pid.read_text().strip()):
            return False
        address, port = self._listen
        nearest = ip_address("::1" if address.version == 6 else "127.0.0.1") if address.is_unspecified else address
        try:
            socket.create_connection((str(nearest), port), timeout=5).close()
        except OSError:
            return False
        return True

    def words(self) -> str:
        """nginx's last complaint since it was prepared."""
        log = self.folder / "error.log"
        return _last_words(log.read_bytes()[self._logged :].decode(errors="replace") if log.exists() else "")

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
            process.wait(20)  # the keeper kills an nginx that takes longer than a quarter of this
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find_nginx() -> str:
    """Where nginx is. Raises :class:`UserError`."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")
    if found is None:
        raise UserError("nginx is not installed: on Debian and Ubuntu, apt-get install nginx-light")
    return found


def _address(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    host, _, port = text.rpartition(":")
    try:
        address = ip_address(host.strip("[]"))
        number = int(port)
        if not 0 < number < 1 << 16:
            raise ValueError
    except ValueError:
        raise UserError(f'"{text}": an address and a port are wanted, as in 0.0.0.0:8443 or [::]:8443') from None
    return address, number


def _written(address: IPv4Address | IPv6Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if "still could not bind" not in line]  # the line before says why
    lines = [line for line in lines if "[emerg]" in line] or lines or ["it says nothing"]
    return lines[-1].removeprefix("nginx: ").strip()
