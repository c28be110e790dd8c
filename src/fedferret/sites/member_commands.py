"""The commands `fedferret sites list|add|retire`, called with the values of their options.

They write files that a running server reads (``members.py``), so they work on a stopped run too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from fedferret.config import Recipe, load
from fedferret.core.clients import ClientChanges
from fedferret.core.errors import UserError
from fedferret.run_folder import finished
from fedferret.sites import state
from fedferret.sites.credentials import check_name
from fedferret.sites.members import Members, check_left, write
from fedferret.sites.status import doing
from fedferret.tracking import events
from fedferret.tracking.client_lists import clients_at

if TYPE_CHECKING:
    from rich.table import Table

Log = Callable[[str], None]
PATIENCE = 10.0  # seconds to wait for another of these commands, which issues a certificate at most


def add(run: Path, name: str, pki: Path | None, insecure: bool, log: Log) -> None:
    """Let a further site take part in a run, from the first round on that begins after it has connected.

    Args:
        run: the run's folder; its server may be running.
        name: of the site.
        pki: the folder of `fedferret pki`; None: the server's.
        insecure: the server runs without certificates, and none is issued.
        log: called with each line for the operator.
    Raises:
        UserError: for a name that is not valid or not free, without certificates, or if the run is finished.
        RunError: if a file of the run is damaged.
    """
    check_name(name)
    server, recipe = _served(run)
    with _alone(run):
        members = Members(run, recipe)
        if name in members.retired():
            raise UserError(
                f"{name} was retired from {run}, and a retired name does not come back: add the site under another "
                f"name, such as {name}-b"
            )
        if name in members.names():
            raise UserError(f"{name} takes part in {run} already; see `fedferret sites list {run}`")
        _check_unfinished(recipe, run)
        if server.get("secure"):
            _issued(_pki(server, pki), name, log)
        elif not insecure:
            raise UserError(
                f"{run} is served without certificates: add --insecure to let whoever gives the name {name} take part, "
                f"or serve it with those of `fedferret pki`"
            )
        write(run, ClientChanges(added=(name,)))
    log(f"{name} takes part from the first round on that begins after it has connected{_started(server)}.")


def retire(run: Path, name: str, pki: Path | None, keep_certificate: bool, log: Log) -> None:
    """Sample a site no more, from the next round on, and revoke its certificate.

    Args:
        run: the run's folder; its server may be running.
        name: of the site.
        pki: the folder of `fedferret pki`; None: the server's.
        keep_certificate: do not revoke the certificate: the site takes part in other runs.
        log: called with each line for the operator.
    Raises:
        UserError: for a site that is none of the run's or that it cannot do without, or if the run is finished.
        RunError: if a file of the run is damaged.
    """
    server, recipe = _served(run)
    folder = _pki(server, pki)
    issued = bool(server.get("secure")) and (folder / "sites" / name).is_dir()
    with _alone(run):
        members = Members(run, recipe)
        left, retired = members.names(), members.retired()
        if name in retired and issued:
            raise UserError(f"{name} is retired already; its certificate is valid until `fedferret pki revoke {name}`")
        check_left(recipe, left, retired, name, name)
        _check_unfinished(recipe, run)
        write(run, ClientChanges(retired=(name,)))
    count = len(left) - 1
    log(f"{name} is retired: no round that begins now samples it. {count} site{'s' * (count != 1)} left.")
    if count < recipe.clients.per_round:
        log(f"Note:     rounds then have {count} of the {recipe.clients.per_round} sites of clients.per_round")
    if keep_certificate or not issued:
        return
    if not (folder / "ca.key").exists():
        log(
            f"Note:     {folder} has no authority's key: run `fedferret pki revoke {name}` where it is, and copy "
            f"revoked.crl here"
        )
        return
    from fedferret.sites import pki_commands

    pki_commands.revoke(folder, name, log)


def sites_table(run: Path) -> Table:
    """Return the sites of a run: since which round each takes part, and which are retired.

    Args:
        run: the folder of a served run.
    Raises:
        UserError: if no server was started in the folder, or a file is damaged.
        RunError: if a file of the run is damaged.
    """
    from rich.table import Table

    _, recipe = _served(run)
    members = Members(run, recipe)
    lists = events.read(run).lists if (run / events.FILE).exists() else []
    named, changes = recipe.data.sites, members.changes()  # type: ignore[attr-defined]  # Members checked the source
    first = clients_at(lists, 1, named)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("site", "since", "status"):
        table.add_column(title)
    for name in sorted({*named, *changes.added, *changes.retired}):
        since = 1 if name in first else next((each.round for each in lists if name in each.clients), None)
        until = next((each.round for each in lists if name in each.retired), None)
        if name in changes.retired:
            status = f"retired from {f'round {until}' if until else 'the next round'} on"
        else:
            status = "takes part" if since else "takes part once it has connected"
        table.add_row(name, f"round {since}" if since else "", status)
    return table


def _served(run: Path) -> tuple[dict[str, Any], Recipe]:
    """What the server of a run wrote about itself, and the recipe that it serves."""
    known, path = state.read(run, "server"), run / state.FOLDER / "recipe.toml"
    if not known or not path.exists():
        raise UserError(f"{run}: no server was started in that folder; give the run's folder (`fedferret serve --out`)")
    return known, load(path)


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One of these commands at a time."""
    try:
        with FileLock(run / state.FOLDER / ".sites.lock", timeout=PATIENCE):
            yield
    except Timeout:
        raise UserError(f"another `fedferret sites` command changes {run}: give this one again after it") from None


def _check_unfinished(recipe: Recipe, run: Path) -> None:
    if finished(recipe, run):
        raise UserError(f"{run} is finished, and no round is left: a list of sites no longer changes anything")


def _pki(server: dict[str, Any], given: Path | None) -> Path:
    return given or Path(str(server.get("pki") or "pki"))


def _issued(folder: Path, name: str, log: Log) -> None:
    """Have credentials of the site in the folder, made now or before, and log where the archive is."""
    from fedferret.sites import pki_commands

    site, again = folder / "sites" / name, "and give this command again"
    if all((site / f"{key}.pub").exists() for key in ("node", "signing")):
        archive = site.with_suffix(".tar")
        log(f"Archive:  {archive if archive.exists() else 'not here'}, issued before; the site may have it already")
        return
    if not folder.exists():
        raise UserError(f"--pki {folder}: there are no certificates; make them with `fedferret pki init`, {again}")
    if not (folder / "ca.key").exists():
        raise UserError(
            f"{folder} has no authority's key: run `fedferret pki issue {name}` where it is, copy sites/{name}/*.pub "
            f"here, {again}"
        )
    pki_commands.issue(folder, name, log)


def _started(server: dict[str, Any]) -> str:
    return "" if doing(server) in ("starting", "serving") else "; start `fedferret serve` again"
