"""What a command prints and exits with when it cannot do what was asked: the one place that all commands share.

    UserError                          2    a mistake of the user's
    OSError                            2    a file or folder that cannot be read or written
    RunError                           1    a run that cannot go on
    Ctrl-C, SIGTERM, SIGHUP            130, 143, 129

Any other exception is a defect of ours, and shows its traceback.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import in_words
from fedferret.core.signals import code_of, stoppable
from fedferret.core.text import plain_line

PATH_ERRORS = ("embedded null", "Symlink loop")  # of pathlib, which raises ValueError and RuntimeError for such paths
LONGEST = 1000  # characters of a line: it names a file, and a file's name has 255
_EMPTY = re.compile(r"(--[\w-]+=)?\s*")


class Commands(TyperGroup):
    """The commands. An empty argument is refused: as a path, it would be the working folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line. Raises Exit where a value is empty, such as that of a variable that is not set."""
        for place, word in enumerate(args):
            if _EMPTY.fullmatch(word):
                option = word.rstrip("= ") or (args[place - 1] if place else "")
                after = f" after {option}" if option else ""
                with one_line_errors():
                    raise UserError(f"there is an empty value{after}: give one, or leave the option out")
        return super().parse_args(ctx, args)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors that are no defects as one line and exit; SIGTERM and SIGHUP end the command as Ctrl-C does."""
    try:
        with stoppable():
            yield
    except UserError as error:
        _print_error(error)
        raise typer.Exit(2) from None
    except RunError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    except BrokenPipeError:  # whoever read the output has read enough
        raise typer.Exit(1) from None
    except OSError as error:
        if error.filename is None and error.errno is None:  # raised by a library for reasons unknown here: a defect
            raise
        _print_error(f"{in_words(error)}: mend that, or give another file or folder")
        raise typer.Exit(2) from None
    except (ValueError, RuntimeError) as error:
        if not any(words in str(error) for words in PATH_ERRORS):
            raise
        _print_error(f"{error}: give another file or folder")
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        _print_error(error if error.args else "stopped")
        raise typer.Exit(code_of(error)) from None


def _print_error(error: object) -> None:
    # messages of torch can have many lines, and names in a message any character
    print("fedferret:", plain_line(str(error), LONGEST), file=sys.stderr)
