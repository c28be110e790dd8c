"""The commands of Flower's processes: on loopback, without telemetry, and without starting code.

SuperLink (server) and SuperNode (site) pass messages on. With `--isolation process` neither starts an app: each gives
tasks to a process that shows the secret over loopback. Here these processes are `server_app` and `client_app`, which
run the installed fedferret. So no run package is unpacked, no dependency is installed, and no process of Flower is left
behind. Follows flwr 1.41 (`flwr/superlink/cli/flower_superlink.py`, `flwr/supernode/cli/flower_supernode.py`).
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
    """Paths of a TLS server's certificate and key, and of the authority that its clients trust."""

    authority: Path
    certificate: Path
    key: Path


def environment(home: Path) -> dict[str, str]:
    """Return the environment of every process that imports Flower: no telemetry, no update check, no installation.

    Args:
        home: the folder for Flower's files, instead of ~/.flwr.
    """
    never_by_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY", ""), LOOPBACK, "localhost")))
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": never_by_proxy,
        "no_proxy": never_by_proxy,
    }


def superlink(host: str, port: int, folder: Path, certificates: Certificates | None) -> list[str]:
    """Return the command of a server's SuperLink.

    Args:
        host: the interface to listen on: loopback, but for a server without certificates off loopback.
        port: the port to listen on.
        folder: the SuperLink's database and secret.
        certificates: for TLS and registered node keys; None: insecure.
    """
    if certificates is None:
        security = ["--insecure"]
    else:
        security = ["--ssl-ca-certfile", str(certificates.authority), "--ssl-certfile", str(certificates.certificate)]
        security += ["--ssl-keyfile", str(certificates.key), "--enable-supernode-auth"]
    address = ["--host", host, "--port", str(port)]
    state = ["--database", str(folder / "superlink.db")]
    return [_script("flower-superlink"), *address, *security, *_isolated(folder), *state]


def supernode(
    server: str, port: int, folder: Path, authority: Path | None, key: Path | None, name: str, trainer: Path
) -> list[str]:
    """Return the command of a site's SuperNode.

    Args:
        server: the address to call, HOST:PORT: the forwarder, or the server if insecure.
        port: the port on loopback for the site's ClientApp.
        folder: the SuperNode's secret.
        authority: the certificate to trust; None: no TLS.
        key: the private node key; None: insecure.
        name: the site's name.
        trainer: the trainer's socket.
    """
    security = ["--insecure"] if authority is None else ["--root-certificates", str(authority)]
    security += ["--auth-supernode-private-key", str(key)] if key else []
    known = f'name="{name}" socket="{trainer}"'
    address = ["--superlink", server, "--host", LOOPBACK, "--port", str(port)]
    return [_script("flower-supernode"), *address, *security, *_isolated(folder), "--node-config", known]


def secret(folder: Path) -> bytes:
    """Return the secret that Flower's process and the app share; make it where it is missing, with mode 600."""
    path = folder / "secret"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()


def free_port() -> int:
    """Return a port on loopback that no process has at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def check_free(port: int) -> None:
    """Check that no process has this port of loopback.

    Raises:
        UserError: if one does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            raise UserError(f"port {port} is taken by another process: give another one with --listen") from None


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Log only Flower's errors: it also logs every message and every retry, which an operator does not need."""
    import logging

    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _isolated(folder: Path) -> list[str]:
    secret(folder)
    return ["--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret")]


def _script(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise UserError('Flower is not installed: pip install "fedferret[flower]"')
    return str(path)
