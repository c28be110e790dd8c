"""The field's words: source, docs, README and examples are searched for the ones in tests/vocabulary.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEARCHED = (
    "src",
    "docs",
    "examples",
    "benchmarks",
    "recipes",
    "deploy",
    "supply",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
)
EXEMPT = ("docs/results/", "docs/images/", "recipes/small/chat-3m/")
ALIASES = "src/fedferret/renamed_keys.py"  # where old keys are read
SUFFIXES = {".py", ".md", ".toml", ".jinja", ".html", ".css", ".c", ".sh", ".yaml", ".yml", ".service", ""}


def words() -> dict[str, str]:
    """Each pattern with what to write instead."""
    return dict(tomllib.loads((ROOT / "tests" / "vocabulary.toml").read_text(encoding="utf-8"))["words"])


def searched(roots: Sequence[str] = SEARCHED) -> Iterator[Path]:
    """The files that must have the field's words."""
    listed = subprocess.run(["git", "ls-files", *roots], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in SUFFIXES and not name.startswith(EXEMPT) and name != ALIASES and path.exists():
            yield path


def found(path: Path) -> Iterator[str]:
    """Every place in a file that has a word of the list, with what to write instead."""
    patterns = {re.compile(pattern): instead for pattern, instead in words().items()}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for pattern, instead in patterns.items():
            if match := pattern.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: write {instead}"


def test_the_words_are_the_fields() -> None:
    places = [place for path in searched() for place in found(path)]
    assert not places, "\n".join(places)


def test_the_search_finds_a_word_that_is_put_in(tmp_path: Path) -> None:
    examples = [
        "a run that is played again",
        "the yardstick",
        "nats a token",
        "a site whose data stays",
        "it lacks records",
    ]
    assert all(any(re.search(pattern, example) for pattern in words()) for example in examples)


if __name__ == "__main__":  # python tests/unit/test_vocabulary.py PATH...: the places below these
    for path in searched(sys.argv[1:] or SEARCHED):
        print(*found(path), sep="\n", end="\n" if any(found(path)) else "")
