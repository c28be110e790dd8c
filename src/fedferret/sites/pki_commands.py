"""What `fedferret pki` does and says: each function one command; ``say`` takes a line for the operator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from fedferret.sites.credentials import WARN_DAYS, read_server
from fedferret.sites.pki import SERVER, Authority

Say = Callable[[str], None]


def init(folder: Path, hosts: Sequence[str], title: str, say: Say) -> None:
    """Make the folder; raises :class:`UserError` where there is one."""
    made = Authority.create(folder, hosts, title)
    say(f"Authority:  {made.folder} (ca.key signs here and is sent to nobody: keep a copy in a safe place)")
    say(f"Server:     to be called as {', '.join(read_server(made.folder).hosts)}")
    say("Next:       fedferret pki issue NAME, once for each site")


def issue(folder: Path, name: str, say: Say) -> None:
    """Make a site's archive."""
    authority = _opened(folder, say)
    _hand_over(authority.issue(name), name, say)


def renew(folder: Path, name: str, hosts: Sequence[str], say: Say) -> None:
    """Make a certificate anew."""
    made = _opened(folder, say).renew(name, hosts)
    if name == SERVER:
        say(f"Server:   renewed, called as {', '.join(read_server(folder).hosts)}; a proxy that runs takes it over")
    else:
        _hand_over(made, name, say)


def revoke(folder: Path, name: str, say: Say) -> None:
    """Shut a site out."""
    count = _opened(folder, say).revoke(name)
    say(f"Revoked:  {count} certificate{'s' * (count != 1)} of {name}; a proxy that runs refuses them from now on")


def show(folder: Path, say: Say) -> None:
    """List what there is."""
    shown: set[str] = set()
    for one in _opened(folder, say).standings():
        if one.revoked:
            state = "revoked"
        elif one.name in shown:
            state = f"replaced; {one.days_left} days left"
        elif one.days_left < 0:
            state = "expired"
        else:
            state = f"{one.days_left} days left" + (": renew it" if one.days_left < WARN_DAYS else "")
        shown.add(one.name)
        say(f"{one.name:<24} {one.serial:040x}  {state}")


def _opened(folder: Path, say: Say) -> Authority:
    authority = Authority(folder)
    for notice in authority.notices:
        say(f"Note:     {notice}")
    return authority


def _hand_over(archive: Path, name: str, say: Say) -> None:
    say(f"Archive:  {archive}")
    say(f"SHA-256:  {hashlib.sha256(archive.read_bytes()).hexdigest()}")
    say(f"Send it to {name} by a way that nobody else reads (it holds keys), and compare the SHA-256 by telephone.")
