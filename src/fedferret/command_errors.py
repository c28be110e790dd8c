"""What a command prints and exits with when it cannot do what was asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fedferret.core.errors import RunError, UserError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors as one line and exit: UserError with code 2, RunError or a file's error with 1, Ctrl-C with 130."""
    try:
        yield
    except UserError as error:
        _print_error(error)
        raise typer.Exit(2) from None
    except RunError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.filename is None:  # of no file of the user's: a defect
            raise
        _print_error(f"{error.filename}: {error.strerror}: mend that, and give the command again")
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        _print_error(error if error.args else "stopped")
        raise typer.Exit(130) from None


def _print_error(error: object) -> None:
    print("fedferret:", " ".join(str(error).split()), file=sys.stderr)  # messages of torch can have many lines
