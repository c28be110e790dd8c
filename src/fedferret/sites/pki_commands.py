"""What `fedferret pki` does and says: each function one command; ``log`` takes a line for the operator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from fedferret.sites.credentials import WARN_DAYS, read_server
from fedferret.sites.pki import SERVER, Authority

Log = Callable[[str], None]


def init(folder: Path, hosts: Sequence[str], title: str, log: Log) -> None:
    """Make the folder; raises :class:`UserError` where there is one."""
    made = Authority.create(folder, hosts, title)
    log(f"Authority:  {made.folder} (ca.key signs here and is sent to nobody: keep a copy in a safe place)")
    log(f"Server:     to be called as {', '.join(read_server(made.folder).hosts)}")
    log("Next:       fedferret pki issue NAME, once for each site")


def issue(folder: Path, name: str, log: Log) -> None:
    """Make a site's archive."""
    authority = _open(folder, log)
    _hand_over(authority.issue(name), name, log)


def renew(folder: Path, name: str, hosts: Sequence[str], log: Log) -> None:
    """Make a certificate anew."""
    made = _open(folder, log).renew(name, hosts)
    if name == SERVER:
        log(f"Server:   renewed, called as {', '.join(read_server(folder).hosts)}; a proxy that runs takes it over")
    else:
        _hand_over(made, name, log)


def revoke(folder: Path, name: str, log: Log) -> None:
    """Shut a site out."""
    count = _open(folder, log).revoke(name)
    log(f"Revoked:  {count} certificate{'s' * (count != 1)} of {name}; a proxy that runs refuses them from now on")


def show(folder: Path, log: Log) -> None:
    """List what there is."""
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
    log(f"Send it to {name} by a way that nobody else reads (it holds keys), and compare the SHA-256 by telephone.")
