"""The errors a user can cause, each one clear line; anything else that is raised is a defect of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake: says what was given, what is allowed and what to do. The command exits with 2."""


class RunError(RuntimeError):
    """A run that cannot go on (too few clients replied, the disk is full). What is done stays resumable."""


class TooFewClients(RunError):
    """A round with fewer client updates than the plan asks for: a later try may go well."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A hint for a misspelt name.

    >>> nearest("ferett", ["fedavg", "ferret"])
    'did you mean "ferret"?'

    Args:
        given: the name as the user wrote it.
        allowed: the valid names, in any order.

    Returns:
        The closest valid name as a question, or all valid names in alphabetical order where none is close.
    """
    allowed = sorted(allowed)
    if not allowed:
        return "there is none"
    close = difflib.get_close_matches(given, allowed, n=1)
    return f'did you mean "{close[0]}"?' if close else f"allowed: {', '.join(allowed)}"
