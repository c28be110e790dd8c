"""The commands `fedferret serve` and `fedferret join`, called with the values of their options.

Each command imports only the modules that it needs: a site's supervisor imports neither PyTorch nor Flower.
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
    accept_changed_data: bool,
    log: Callable[[str], None],
) -> None:
    """Serve a recipe.

    Args:
        tables: the recipe's tables, as in its TOML file.
        out: the run's folder.
        listen: where sites call, HOST:PORT.
        pki: the folder of `fedferret pki`; not read if ``insecure``.
        wait: seconds to wait for all sites before a round.
        insecure: without certificates.
        insecure_off_loopback: allow ``insecure`` on other interfaces than loopback.
        accept_changed_data: go on with other held-out rows than the run began with.
        log: called with each line for the operator.
    Raises:
        UserError: for a mistake in the recipe or the options.
        RunError: if the run cannot go on.
        KeyboardInterrupt: on Ctrl-C or SIGTERM.
    """
    if not insecure and not pki.exists():
        raise UserError(
            f"--pki {pki}: there are no certificates; make them with `fedferret pki init`, or add --insecure for a "
            f"trial on loopback"
        )
    from fedferret.config import from_tables
    from fedferret.run_folder import as_begun
    from fedferret.sites import serve as serving
    from fedferret.sites.credentials import read_server

    credentials = None if insecure else read_server(pki)
    settings = serving.ServeSettings(
        listen=listen,
        credentials=credentials,
        wait=wait,
        insecure_off_loopback=insecure and insecure_off_loopback,
        accept_changed_data=accept_changed_data,
    )
    serving.serve(from_tables(as_begun(tables, out, log)), out, settings, log)
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
    accept_changed_data: bool,
    log: Callable[[str], None],
) -> None:
    """Take part in a run as a site.

    Args:
        address: of the server, HOST:PORT.
        name: the site's name in the recipe.
        data: the data file; None: as in ``site.toml``.
        folder: the site's folder; None: ``sites/NAME``.
        credentials: archive or folder from the server's administrator; None: those in the site's folder.
        package: SHA-256 of the run package to accept; "": the one that this fedferret makes.
        insecure: without certificates.
        insecure_off_loopback: allow ``insecure`` to a server that is not on loopback.
        accept_changed_data: take the data as it is, though another content is pinned.
        log: called with each line for the operator.
    Raises:
        UserError: for a mistake in the options, the credentials or the data.
        RunError: if the trainer does not start.
        KeyboardInterrupt: on Ctrl-C or SIGTERM.
    """
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
        accept_changed_data=accept_changed_data,
    )
    joining.join(settings, log)
