"""A site's words are plain text: one line that neither moves a cursor nor fills a screen, in every view."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.table import Table

import fedferret
from fedferret.core.errors import UserError
from fedferret.core.exchanges import Failure
from fedferret.core.text import plain_line
from fedferret.data.examples import FederatedData
from fedferret.tracking.console import plain_console

ROOT = Path(fedferret.__file__).parent
HOSTILE = [
    "\x1b]0;your terminal\x07",  # sets a window's title
    "\x1b[2J\x1b[31mred",
    "\x9b31mred",  # the same in one byte
    "\a\b\r\0\x7f",
    "one\ntwo\r\nthree\u2028four",
    "\u202etxt.exe\u2066\u200b\ufeff",  # right to left, isolates, marks of no width
    "\ud800 half",
]


@pytest.mark.parametrize("words", HOSTILE, ids=ascii)
def test_a_failures_words_are_one_line_of_printable_characters(words: str) -> None:
    failure = Failure(words, words, words)
    for text in (failure.client, failure.stage, failure.reason):
        assert text.isprintable() and text.encode("utf-8")
    assert Failure(failure.client, failure.stage, failure.reason) == failure  # as read back from the event log


def test_honest_words_stay() -> None:
    words = "Zoë (St.  Mary's): delta[wte.weight] holds NaN — 数据 \u00a0x"
    assert Failure(words, "pool", words).client == words
    assert Failure("a", "pool", words).reason == " ".join(words.split())


class Long(str):
    """A text that is not searched as a whole."""

    __slots__ = ()

    def split(self, *_: object, **__: object) -> list[str]:
        raise AssertionError("5 MB were split")


def test_of_a_text_of_megabytes_only_the_beginning_is_looked_at() -> None:
    assert len(Failure("a", "wire", Long("ha " * 2_000_000)).reason) == 300
    assert plain_line(Long(" " * 10_000 + "x")) == ""


def test_markup_is_printed_as_it_is() -> None:
    words = "[bold]b[/bold] [link=file:///etc/passwd]l[/link] :bomb: delta[wte.weight] [/]"
    file, table = io.StringIO(), Table(title=words)
    table.add_column(words)
    table.add_row(words)
    console = plain_console(file, 200)
    console.print(table)
    console.print(words)
    assert file.getvalue().count(words) == 4


def test_no_view_makes_a_console_of_its_own() -> None:
    for path in ROOT.rglob("*.py"):
        if path.name != "console.py":
            found = re.search(
                r"\bConsole\(|rich\.print|rich import print|from_markup|import rich$", path.read_text(), re.M
            )
            assert not found, f"{path}: prints with markup; use tracking/console.py"


def test_a_client_has_a_name_that_prints() -> None:
    for name in ("ward\n7", "x" * 301, "\x1b[31m"):
        with pytest.raises(UserError, match="rename the client in the data"):
            FederatedData({name: ()}, {}, "files")
