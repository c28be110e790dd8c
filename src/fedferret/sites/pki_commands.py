"""The commands of `fedferret pki`, one function each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from fedferret.sites.credentials import WARN_DAYS, read_server
from fedferret.sites.pki import SERVER, Authority

Log = Callable[[str], None]


def init(folder: Path, hosts: Sequence[str], title: str, log: Log) -> None:
    """Make the authority and the server's certificates.

    Args:
        folder: new or empty.
        hosts: the names and addresses under which sites call the server.
        title: the federation's name.
        log: called with each line for the operator.
    Raises:
        UserError: if the folder is not empty, or for an invalid host or title.
    """
    made = Authority.create(folder, hosts, title)
    log(f"Authority:  {made.folder} (send ca.key to nobody, and keep a copy in a safe place)")
    log(f"Server:     sites call it as {', '.join(read_server(made.folder).hosts)}")
    log("Next:       run `fedferret pki issue NAME` once for each site")


def issue(folder: Path, name: str, log: Log) -> None:
    """Make a site's credentials.

    Args:
        folder: the folder of `fedferret pki`.
        name: the site's name.
        log: called with each line for the operator.
    Raises:
        UserError: for an invalid or existing name.
    """
    authority = _open(folder, log)
    _hand_over(authority.issue(name), name, log)


def renew(folder: Path, name: str, hosts: Sequence[str], log: Log) -> None:
    """Make a new certificate for a site or the server.

    Args:
        folder: the folder of `fedferret pki`.
        name: a site's name, or "server".
        hosts: the server's new names and addresses; none: as before.
        log: called with each line for the operator.
    Raises:
        UserError: for an unknown site, or hosts for a site.
    """
    made = _open(folder, log).renew(name, hosts)
    if name == SERVER:
        known = ", ".join(read_server(folder).hosts)
        log(f"Server:   renewed, sites call it as {known}; a running proxy reads it within seconds")
    else:
        _hand_over(made, name, log)


def revoke(folder: Path, name: str, log: Log) -> None:
    """Revoke a site's certificates.

    Args:
        folder: the folder of `fedferret pki`.
        name: the site's name.
        log: called with each line for the operator.
    Raises:
        UserError: for an unknown site.
    """
    count = _open(folder, log).revoke(name)
    log(f"Revoked:  {count} certificate{'s' * (count != 1)} of {name}; a running proxy refuses them within seconds")


def show(folder: Path, log: Log) -> None:
    """List the certificates.

    Args:
        folder: the folder of `fedferret pki`.
        log: called with a line for each certificate.
    Raises:
        UserError: if the folder has no authority.
    """
    shown: set[str] = set()
    for one in _open(folder, log).statuses():
        if one.revoked:
            state = "revoked"
        elif one.name in shown:
            state = f"replaced; {one.days_left} days left"
        elif one.days_left < 0:
            state = "expired"
        else:
            state = f"{one.days_left} days left" + (": renew it" if one.days_left < WARN_DAYS else "")
        shown.add(one.name)
        log(f"{one.name:<24} {one.serial:040x}  {state}")


def _open(folder: Path, log: Log) -> Authority:
    authority = Authority(folder)
    for notice in authority.notices:
        log(f"Note:     {notice}")
    return authority


def _hand_over(archive: Path, name: str, log: Log) -> None:
    log(f"Archive:  {archive}")
    log(f"SHA-256:  {hashlib.sha256(archive.read_bytes()).hexdigest()}")
    log(f"Send it to {name} so that nobody else can read it (it holds keys), and compare the SHA-256 by telephone.")
