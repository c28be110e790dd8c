"""A stranger's words as plain text: what a terminal or a page shows can neither move its cursor nor fill its window.

Control characters (escape sequences begin with one), the marks that reverse the order of a line and lone halves of
characters become "�". Square brackets stay, because they are part of tensors' names: every console that the package
prints on takes them literally (``tracking/console.py``).
"""

from __future__ import annotations

import unicodedata

LONGEST = 300  # characters of one site's words in one line
_READ = 4096  # characters that are looked at: a text of megabytes costs no more


def printable(text: str, longest: int = LONGEST) -> str:
    """Replace what does not print; spaces stay as they are.

    Args:
        text: of any length and content.
        longest: characters to keep.

    Returns:
        The beginning of ``text`` with every character printable.
    """
    return "".join(
        each if each.isprintable() or unicodedata.category(each) == "Zs" else "\ufffd" for each in text[:longest]
    )


def plain_line(text: str, longest: int = LONGEST) -> str:
    """Put a text of any origin on one line.

    Args:
        text: of any length and content; only the beginning is looked at.
        longest: characters to keep.

    Returns:
        At most ``longest`` printable characters; line breaks and runs of spaces are one space.
    """
    return printable(" ".join(text[:_READ].split()), longest)


def shortened(name: str, longest: int = 60) -> str:
    """Show a name of any length and content.

    Args:
        name: from data or a recipe.
        longest: characters to keep, the ellipsis among them.

    Returns:
        At most ``longest`` printable characters, with an ellipsis where the name has more.
    """
    return printable(name, longest) if len(name) <= longest else printable(name, longest - 1) + "…"


def printable_lines(text: str, longest: int = LONGEST) -> str:
    """Show a text of several lines, such as a recipe.

    Args:
        text: of any content.
        longest: characters to keep of each line.

    Returns:
        The text with every character printable but line breaks and tabs, and with long lines cut.
    """
    return "\n".join(
        "\t".join(map(lambda part: shortened(part, longest), line.split("\t"))) for line in text.split("\n")
    )
