"""Errors of a command as one line on standard error, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors as one line and exit: UserError with code 2, RunError with 1, Ctrl-C with 130."""
    from typer import Exit

    from fedferret.core.errors import RunError, UserError

    try:
        yield
    except UserError as error:
        _print_error(error)
        raise Exit(2) from None
    except RunError as error:
        _print_error(error)
        raise Exit(1) from None
    except KeyboardInterrupt as error:
        _print_error(error if error.args else "stopped")
        raise Exit(130) from None


def _print_error(error: object) -> None:
    print("fedferret:", " ".join(str(error).split()), file=sys.stderr)  # messages of torch can have many lines
