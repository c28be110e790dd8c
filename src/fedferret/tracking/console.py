"""The one place that makes a console, so that no view can forget to print names and reasons as they are.

rich reads ``[red]`` in a string as markup and would swallow ``delta[wte.weight]``; on this console it prints both.
"""

from __future__ import annotations

from typing import IO

from rich.console import Console


def plain_console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """Make a console that prints every string literally.

    Args:
        file: to print to; None: standard output.
        width: columns; None: the terminal's.

    Returns:
        A console without markup, emoji codes and highlighting of strings.
    """
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)
