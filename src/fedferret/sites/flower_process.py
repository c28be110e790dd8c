"""Flower's processes, as this project runs them: quiet, alone on loopback, and without power over code.

SuperLink (server) and SuperNode (site) pass messages on. In "process" isolation neither starts an app: each holds
tasks for whoever shows its secret over loopback, here `server_app` and `client_app`, which run the installed
fedferret. So no run package is ever unpacked, no dependency installed, and no process of Flower's is left behind.
As in flwr 1.41 (`flwr/superlink/cli/flower_superlink.py`, `flwr/supernode/cli/flower_supernode.py`).
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedferret.core.errors import UserError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Certificates:
    """Paths of what a TLS server on loopback shows, and of what those who call it trust."""

    authority: Path
    certificate: Path
    key: Path


def environment(home: Path) -> dict[str, str]:
    """What every process with Flower in it is given: nothing is reported, looked up or installed over the network."""
    never_by_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY", ""), LOOPBACK, "localhost")))
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),  # or it writes to ~/.flwr
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": never_by_proxy,
        "no_proxy": never_by_proxy,
    }


def superlink(host: str, port: int, folder: Path, certificates: Certificates | None) -> list[str]:
    """The command of a server's SuperLink, its state in ``folder``; ``host`` is loopback for all who have a choice."""
    if certificates is None:
        security = ["--insecure"]
    else:
        security = ["--ssl-ca-certfile", str(certificates.authority), "--ssl-certfile", str(certificates.certificate)]
        security += ["--ssl-keyfile", str(certificates.key), "--enable-supernode-auth"]
    address = ["--host", host, "--port", str(port)]
    state = ["--database", str(folder / "superlink.db")]
    return [_script("flower-superlink"), *address, *security, *_alone(folder), *state]


def supernode(
    server: str, port: int, folder: Path, authority: Path | None, key: Path | None, name: str, trainer: Path
) -> list[str]:
    """The command of a site's SuperNode: it calls ``server``, and serves the site's app on loopback's ``port``."""
    security = ["--insecure"] if authority is None else ["--root-certificates", str(authority)]
    security += ["--auth-supernode-private-key", str(key)] if key else []
    known = f'name="{name}" socket="{trainer}"'
    address = ["--superlink", server, "--host", LOOPBACK, "--port", str(port)]
    return [_script("flower-supernode"), *address, *security, *_alone(folder), "--node-config", known]


def secret(folder: Path) -> bytes:
    """The secret that Flower's half and ours share, made when there is none; for the folder's owner alone."""
    path = folder / "secret"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()


def free_port() -> int:
    """A port on loopback that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def check_free(port: int) -> None:
    """Raise UserError where another process has this port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            raise UserError(f"port {port} is taken by another process: give another one with --port") from None


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Flower's own log at errors: its lines on every message and every retry are no news for an operator."""
    import logging

    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _alone(folder: Path) -> list[str]:
    secret(folder)
    return ["--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret")]


def _script(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise UserError('Flower is not installed: pip install "fedferret[flower]"')
    return str(path)
