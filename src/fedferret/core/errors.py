"""The errors a user can cause, each one clear line; anything else that is raised is a defect of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake: says what was given, what is allowed and what to do. The command exits with 2."""


class RunError(RuntimeError):
    """A run that cannot go on (too few clients answered, the disk is full). What is done so far stays resumable."""


class TooFewClients(RunError):
    """A round that fewer clients answered than the plan asks for: played again later, it may go well."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest allowed one, or all of them when none is close.

    >>> nearest("ferett", ["fedavg", "ferret"])
    'did you mean "ferret"?'
    """
    allowed = sorted(allowed)
    close = difflib.get_close_matches(given, allowed, n=1)
    return f'did you mean "{close[0]}"?' if close else f"allowed: {', '.join(allowed)}"
