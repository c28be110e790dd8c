"""Check that the laws of laws.toml were tested: ``python tests/laws.py RESULTS.xml ...`` reads pytest's JUnit files."""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree


def passed(results: Sequence[Path]) -> Counter[str]:
    """How often each test passed, over its parameters.

    Args:
        results: JUnit files of pytest.

    Returns:
        Counts by ``folder/module.py::test``, relative to ``tests``.
    """
    counts: Counter[str] = Counter()
    for path in results:
        for case in ElementTree.parse(path).iter("testcase"):
            if all(case.find(kind) is None for kind in ("skipped", "failure", "error")):
                module = case.attrib["classname"].removeprefix("tests.").replace(".", "/")
                counts[f"{module}.py::{case.attrib['name'].partition('[')[0]}"] += 1
    return counts


def laws() -> Mapping[str, str]:
    """The test of each law, by the law's sentence."""
    groups = tomllib.loads(Path(__file__).with_name("laws.toml").read_text())
    return {sentence: test for group in groups.values() for sentence, test in group.items()}


def untested(counts: Mapping[str, int]) -> list[str]:
    """One line for each law that no passed test proves."""
    return [f"{sentence} ({test} did not pass)" for sentence, test in laws().items() if not counts.get(test)]


def main() -> None:
    counts = passed([Path(argument) for argument in sys.argv[1:]])
    missing = untested(counts)
    for line in missing:
        print(f"not tested: {line}", file=sys.stderr)
    print(f"{len(laws()) - len(missing)} of {len(laws())} laws tested, by {sum(counts.values())} passed tests")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
