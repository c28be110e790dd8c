"""What `fedferret serve` and `fedferret join` do, in terms of what their options say.

Each imports its own half alone: a site's supervisor, which does little but wait, has no use for PyTorch and Flower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError


def serve(
    tables: Mapping[str, Any],
    out: Path,
    listen: str,
    pki: Path,
    wait: float,
    insecure: bool,
    insecure_off_loopback: bool,
    log: Callable[[str], None],
) -> None:
    """Serve the recipe that ``tables`` say. Raises UserError, RunError, KeyboardInterrupt."""
    if not insecure and not pki.exists():
        raise UserError(
            f"--pki {pki}: there are no certificates; make them with `fedferret pki init`, or add --insecure to try it "
            f"out on loopback"
        )
    from fedferret.config import from_tables
    from fedferret.sites import serve as serving
    from fedferret.sites.credentials import read_server

    credentials = None if insecure else read_server(pki)
    settings = serving.ServeSettings(
        listen=listen, credentials=credentials, wait=wait, insecure_off_loopback=insecure and insecure_off_loopback
    )
    serving.serve(from_tables(tables), out, settings, log)
    log(f"The run is finished: {out / 'report.html'}")


def join(
    address: str,
    name: str,
    data: Path | None,
    folder: Path | None,
    credentials: Path | None,
    package: str,
    insecure: bool,
    insecure_off_loopback: bool,
    log: Callable[[str], None],
) -> None:
    """Take part as the site ``name``. Raises UserError, RunError, KeyboardInterrupt."""
    from fedferret.sites import join as joining

    settings = joining.JoinSettings(
        address=address,
        name=name,
        data=data,
        folder=folder or Path("sites") / name,
        credentials=credentials,
        insecure=insecure,
        insecure_off_loopback=insecure_off_loopback,
        package=package,
    )
    joining.join(settings, log)
