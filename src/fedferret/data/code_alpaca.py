"""Code Alpaca: instructions for writing code, with responses. Client = programming language.

Chaudhary. "Code Alpaca: An Instruction-following LLaMA model for code generation", 2023. The Ferret paper has nine
languages as clients and holds out a tenth of the rows ("rows"); its published code has no loader. Fed-CodeAlpaca (Kuang
et al. "FederatedScope-LLM", KDD 2024, arXiv 2309.00363) has the same nine clients and tenth. Two files can be read:

    rosetta_alpaca.json      the file of FederatedScope-LLM: a row's input names the language. The rows of "X86-64
                             Assembly" are too few and are left out; nine languages remain.
    code_alpaca_20k.json     the hub's file too: inputs name no language, so the language that the instruction names is
                             the row's client. Rows with an instruction that names none or several are left out. This
                             rule is ours.

A file is read as the first kind where most of its inputs are names of languages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.data.examples import FederatedData, check_at_least, check_fraction
from fedferret.data.published import hub_rows, limit_held_out, local_rows
from fedferret.data.rows import Row
from fedferret.data.table import Table

if TYPE_CHECKING:
    from fedferret.core.keys import Key

NOTICE = "Code Alpaca, (c) 2023 Sahil Chaudhary; CC BY-NC 4.0."

LANGUAGES = ("C", "C#", "C++", "Go", "Java", "PHP", "Pascal", "Python", "Scala")

_COLUMNS = ("instruction", "output")
_HOW_TO_GET = (
    "get data/rosetta_alpaca.json (the paper's: commit d269da1) or data/code_alpaca_20k.json from "
    "https://github.com/sahil280114/codealpaca and set data.path to it"
)


@dataclass(frozen=True)
class CodeAlpaca:
    """Settings of the source "code-alpaca"; the defaults are the paper's."""

    path: str | None = None  # rosetta_alpaca.json or code_alpaca_20k.json; None: code_alpaca_20k.json, from the hub
    name: str = "sahil2801/CodeAlpaca-20k"  # on the hub
    revision: str | None = None  # a commit on the hub makes the run repeatable
    languages: tuple[str, ...] = LANGUAGES  # the clients; rows in other languages are left out
    held_out_fraction: float = 0.1  # share of the rows
    max_held_out: int | None = None  # examples held out, drawn by the key; None: all

    def __post_init__(self) -> None:
        check_fraction("held_out_fraction", self.held_out_fraction)
        check_at_least("max_held_out", self.max_held_out, 1)

    def load(self, key: Key) -> FederatedData:
        """Read the rows, find the language of each and hold rows out.

        Raises:
            UserError: if the data cannot be read, or no row is in any of ``languages``.
        """
        if self.path is not None:
            rows = local_rows(Path(self.path), _COLUMNS, _HOW_TO_GET)
        else:
            rows = hub_rows(self.name, "train", _COLUMNS, _HOW_TO_GET, revision=self.revision)
        table = Table(
            response_column="output",
            client_column="language",
            category_column="language",
            held_out_fraction=self.held_out_fraction,
            max_held_out=None,
        )
        usable = [{**row, "language": language} for row, language in self._with_language(rows)]
        if not usable:
            raise UserError(f"no row of Code Alpaca is in {', '.join(self.languages)}: check data.languages")
        data = table.federate(usable, None, key, source="code-alpaca", notice=NOTICE)
        return limit_held_out(data, self.max_held_out, key.fold("held out"))

    def _with_language(self, rows: Sequence[Row]) -> Iterable[tuple[Row, str]]:
        """The rows in one of the languages, each with that language."""
        inputs = [str(row.get("input") or "").strip() for row in rows]
        if sum(text in LANGUAGES for text in inputs) > len(rows) / 2:
            yield from ((row, text) for row, text in zip(rows, inputs, strict=True) if text in self.languages)
            return
        patterns = {language: _pattern(language) for language in self.languages}
        for row in rows:
            named = [language for language, pattern in patterns.items() if pattern.search(str(row["instruction"]))]
            if len(named) == 1:
                yield row, named[0]


def _pattern(language: str) -> re.Pattern[str]:
    """A pattern for a language's name as a whole word; "C" and "Go" match in this case only: "go" is also a verb."""
    flags = re.NOFLAG if language.isalpha() and len(language) <= 2 else re.IGNORECASE
    return re.compile(rf"(?<![\w'’-]){re.escape(language)}(?![\w+#])", flags)
