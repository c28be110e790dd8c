"""Which site's message ended the server's app, and which sites are therefore left unread.

    RUN/server/reading       by the ServerApp: site and id of the message that is being read; written before it is read
    RUN/server/strikes.json  by `serve`: the messages of each site over which a ServerApp ended

A ServerApp that ends by an error that nobody foresaw is started again. If it was reading a message, this message counts
against its site, and the site is left out of the next exchange: the same message would come again. A site with
``STRIKES`` such messages is left unread: it is sent nothing, until `fedferret sites readmit RUN SITE`.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.sites import state

STRIKES = 3  # messages of one site over which the ServerApp may end
CRASHED = 70  # exit code EX_SOFTWARE of sysexits.h: an error that nobody foresaw
_FAULTS = frozenset(  # SIGKILL is also what the kernel sends to a process that takes all of the memory
    {CRASHED}
    | {-number for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)}
    | {-signal.SIGKILL}
)
_READING = "reading"
_LENGTH = 512  # bytes of that file: it is written in place, many times in a round
_STRIKES = "strikes"


class Reading:
    """The ServerApp's side: notes which site's message is being read, and knows which sites are not to be read."""

    def __init__(self, run: Path, left_out: str = "") -> None:
        """Open the note.

        Args:
            run: the run's folder.
            left_out: site to leave out of one exchange; "": none.
        """
        self._run, self._left_out = run, left_out
        self._messages: dict[str, str] = {}  # id of each site's last message
        self._file = os.open(_path(run), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._noted = True
        self.reading("")

    def unread(self, site: str) -> str:
        """Return why this site is left out of an exchange that begins; "" if it is not."""
        if site in unread_sites(self._run):
            return unread_reason(self._run, site)
        if site and site == self._left_out:
            self._left_out = ""
            return "its last message ended the server's app; it is left out once"
        return ""

    def reading(self, site: str, message: str = "") -> None:
        """Note that this site's message is being read from now on.

        Args:
            site: name; "": none is being read.
            message: its id; "": that of the site's last one.
        """
        if message:
            self._messages[site] = message if re.fullmatch("[0-9a-f]{64}", message) else "not valid"
        if site or self._noted:
            note = json.dumps({"site": site, "message": self._messages.get(site, "")}) if site else ""
            os.pwrite(self._file, note.encode().ljust(_LENGTH)[:_LENGTH], 0)
        self._noted = bool(site)


def blame(run: Path, code: int) -> str:
    """Add a strike against the site of the message that was being read when the ServerApp ended by an unforeseen error.

    Args:
        run: the run's folder.
        code: the ServerApp's exit code.

    Returns:
        The site; "" if no message was being read, or the ServerApp ended for another reason.
    """
    site, message = _noted(run)
    forget_reading(run)
    if not site or code not in _FAULTS:
        return ""
    known = _known(run)
    state.write(run, _STRIKES, {**known, site: [*known.get(site, []), message]})
    return site


def forget_reading(run: Path) -> None:
    """Delete the note of an earlier ServerApp."""
    _path(run).unlink(missing_ok=True)


def unread_sites(run: Path) -> list[str]:
    """Return the sites that are left unread, sorted."""
    return sorted(site for site, messages in _known(run).items() if len(messages) >= STRIKES)


def unread_reason(run: Path, site: str) -> str:
    """Return what an operator is told about a site that is left unread."""
    return f"left unread: {STRIKES} of its messages ended the server's app; `fedferret sites readmit {run} {site}`"


def strikes(run: Path, site: str) -> int:
    """Return how many of a site's messages ended a ServerApp."""
    return len(_known(run).get(site, []))


def readmit(run: Path, site: str) -> None:
    """Forget a site's strikes: from the next exchange on it is sent messages and read again.

    Args:
        run: the run's folder.
        site: name.

    Raises:
        UserError: the folder is no served run's, or the site has no strikes.
    """
    known = _known(run)
    if site not in known:
        struck = f"those with strikes: {', '.join(sorted(known))}" if known else "no site has strikes"
        raise UserError(f"{site}: no message of this site ended the server's app in {run} ({struck})")
    state.write(run, _STRIKES, {name: messages for name, messages in known.items() if name != site})


def _path(run: Path) -> Path:
    return run / state.FOLDER / _READING


def _noted(run: Path) -> tuple[str, str]:
    try:
        note = json.loads(_path(run).read_bytes())
        return str(note["site"]), str(note["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return "", ""


def _known(run: Path) -> dict[str, list[str]]:
    """The messages of each site over which a ServerApp ended. Raises UserError for a damaged file."""
    try:
        return state.read(run, _STRIKES)
    except UserError:
        path = run / state.FOLDER / f"{_STRIKES}.json"
        raise UserError(
            f"{path} is damaged: it names the sites that are left unread; restore it, or remove it, which readmits all"
        ) from None
