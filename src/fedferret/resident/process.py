"""The resident process of a site or a simulation: one trainer behind a local socket, its model loaded once.

    python -m fedferret.resident SITE_FOLDER [--with-parent]

Takes the folder (0700, one resident at a time), checks the site's data, binds SITE_FOLDER/trainer.sock (0600) and
prints ``ready``. One frame in, one frame out, one at a time. ``--with-parent``: ends at once when standard input does,
which is when whoever started it is gone.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedferret.core.errors import UserError
from fedferret.core.imports import quick_imports
from fedferret.engines.relay import SOCKET, address, receive, send
from fedferret.resident.pins import pin
from fedferret.resident.site import allow, check_data, pins_of, read_site, work
from fedferret.tracking.audit import Audit

if TYPE_CHECKING:
    from fedferret.engines.trainer import Trainer
    from fedferret.engines.transport import Seal

PATIENCE = 60.0  # seconds that a relay may take over one frame before it is given up


def open_trainer(folder: Path, seal: Callable[[Path], Seal] | None = None) -> Trainer:
    """The trainer that ``site.toml`` in ``folder`` describes; its data has been read once.

    Args:
        folder: of the site.
        seal: makes the seal of the site's messages; None: none.

    Raises:
        UserError: for settings, data or credentials that are invalid.
    """
    site = read_site(folder)
    check_data(site)
    if site.data is not None:
        pin(folder, pins_of(site, folder))
    if not site.policy.fetch_models:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported, which reads it once
    sealed = seal(folder) if seal else None
    with quick_imports():
        from fedferret.engines.trainer import Trainer  # PyTorch with it, which takes seconds

    if site.threads:
        import torch

        torch.set_num_threads(site.threads)
    if site.data is None:
        return Trainer(partial(work, site, None))
    audit = Audit(folder)

    def log(line: str) -> None:  # for whoever reads the log of the trainer
        print(line, file=sys.stderr, flush=True)

    def record(event: Mapping[str, Any]) -> None:
        audit(event)
        if event["note"]:
            log(f"round {event['round']}: {event['note']}")

    return Trainer(
        partial(work, site, folder, log=log),
        folder,
        site.name,
        record,
        seal=sealed,
        allow=partial(allow, site),
        longest_round=site.policy.longest_round,
        history=site.history,
    )


def take(folder: Path) -> IO[bytes]:
    """Make ``folder`` this process's: for its owner alone, and no second resident. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    lock = (folder / "trainer.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: a trainer is at work there already; stop it first, or give another folder"
        ) from None
    return lock


def listen(folder: Path) -> socket.socket:
    """A listening socket in ``folder`` that only its owner may reach."""
    path = folder / SOCKET
    path.unlink(missing_ok=True)  # an earlier process's, which is gone: the folder is ours
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with address(path) as name:
            listener.bind(name)
    finally:
        os.umask(mask)
    listener.listen()
    return listener


def serve(trainer: Trainer, listener: socket.socket) -> None:
    """Handle one connection after the other, for ever. One that breaks off costs nothing but its response."""
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PATIENCE)
            try:
                send(connection, trainer.handle(receive(connection)))
            except OSError as error:
                print(f"a relay broke off: {error}", file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(0)  # at once, in the middle of a step too: whatever is on disk is whole


def main(seal: Callable[[Path], Seal] | None = None) -> None:
    """Serve the site in the folder that the command line names.

    Args:
        seal: as for ``open_trainer``.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--with-parent"]
    if len(arguments) != (2 if seal else 1):
        sys.exit(
            "usage: python -m fedferret.resident SITE_FOLDER [--with-parent], or with `sites.resident` CREDENTIALS"
        )
    if len(sys.argv) > len(arguments) + 1:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    folder = Path(arguments[0])
    try:
        lock = take(folder)
        trainer = open_trainer(folder, seal)
        listener = listen(folder)
    except (UserError, OSError) as error:  # a folder or file that cannot be what it should be
        print(f"fedferret: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    with lock, listener:
        print("ready", flush=True)
        serve(trainer, listener)
