"""Which site's message ended the server's app, and which sites are therefore left unread.

    RUN/server/reading       by the ServerApp: site and id of the message that is being read, written before it is read,
                             and whether the site is known to have made it
    RUN/server/strikes.json  by `serve`: the messages of each site over which a ServerApp ended

A ServerApp that ends by an error that nobody foresaw is started again. If it was reading a message, the message's site
is left out of the next exchange: the same message would come again. The message is a strike against the site if the
site made it: once its signature is verified (``NotingSeal``), or where nothing is signed. A site with ``STRIKES`` of
them is left unread: it is sent nothing, until `fedferret sites readmit RUN SITE`.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.engines.transport import Seal
from fedferret.sites import state

STRIKES = 3  # messages of one site over which the ServerApp may end
AGAIN = 75  # exit code EX_TEMPFAIL of sysexits.h: another try may succeed
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

    def __init__(self, run: Path, left_out: str = "", signed: bool = False) -> None:
        """Open the note.

        Args:
            run: the run's folder.
            left_out: site to leave out of one exchange; "": none.
            signed: whether a message counts for its site's only once ``opened`` is called.
        """
        self._run, self._left_out, self._signed = run, left_out, signed
        self._messages: dict[str, tuple[str, bool]] = {}  # id of each site's last message; whether the site made it
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
            valid = re.fullmatch("[0-9a-f]{64}", message)
            self._messages[site] = message if valid else "not valid", not self._signed
        if site or self._noted:
            identifier, made = self._messages.get(site, ("", not self._signed))
            note = json.dumps({"site": site, "message": identifier, "made": made}) if site else ""
            os.pwrite(self._file, note.encode().ljust(_LENGTH)[:_LENGTH], 0)
        self._noted = bool(site)

    def opened(self, site: str) -> None:
        """Note that the message that is being read has this site's signature."""
        if site in self._messages:
            self._messages[site] = self._messages[site][0], True
            self.reading(site)


class NotingSeal:
    """A seal that notes which site's message it opened: until then, anyone may have sent it in the site's name."""

    def __init__(self, seal: Seal, reading: Reading) -> None:
        """Put a note around a seal.

        Args:
            seal: the server's.
            reading: the note.
        """
        self._seal, self._reading, self.signs = seal, reading, seal.signs

    def close(self, message: bytes) -> bytes:
        """Seal a request; see ``Seal.close``."""
        return self._seal.close(message)

    def open(self, sender: str, sealed: bytes) -> bytes:
        """Verify a site's response, and note that it is the site's; see ``Seal.open``."""
        message = self._seal.open(sender, sealed)
        self._reading.opened(sender)
        return message


def blame(run: Path, code: int) -> tuple[str, int]:
    """Find the site of the message over which the ServerApp ended by an unforeseen error, and add a strike if due.

    Args:
        run: the run's folder.
        code: the ServerApp's exit code.

    Returns:
        The site, "" if no message was being read or the ServerApp ended for another reason; and the site's number of
        strikes, 0 if this message is none.
    """
    site, message, made = _noted(run)
    forget_reading(run)
    if not site or code not in _FAULTS:
        return "", 0
    if not made:
        return site, 0
    known = _known(run)
    found = [*known.get(site, []), message]
    state.write(run, _STRIKES, {**known, site: found})
    return site, len(found)


def forget_reading(run: Path) -> None:
    """Delete the note of an earlier ServerApp."""
    _path(run).unlink(missing_ok=True)


def unread_sites(run: Path) -> list[str]:
    """Return the sites that are left unread, sorted."""
    return sorted(site for site, messages in _known(run).items() if len(messages) >= STRIKES)


def unread_reason(run: Path, site: str) -> str:
    """Return what an operator is told about a site that is left unread."""
    return f"left unread: {STRIKES} of its messages ended the server's app; `fedferret sites readmit {run} {site}`"


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


def _noted(run: Path) -> tuple[str, str, bool]:
    try:
        note = json.loads(_path(run).read_bytes())
        return str(note["site"]), str(note["message"]), note["made"] is True
    except (OSError, ValueError, LookupError, TypeError):
        return "", "", False


def _known(run: Path) -> dict[str, list[str]]:
    """The messages of each site over which a ServerApp ended. Raises UserError for a damaged file."""
    try:
        return state.read(run, _STRIKES)
    except UserError:
        path = run / state.FOLDER / f"{_STRIKES}.json"
        raise UserError(
            f"{path} is damaged: it names the sites that are left unread; restore it, or remove it, which readmits all"
        ) from None
