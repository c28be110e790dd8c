"""The list of laws: each names a test that exists, and a law whose test did not pass is told."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import laws

TESTS = Path(laws.__file__).parent
RESULTS = """<testsuites><testsuite>
<testcase classname="tests.unit.test_a" name="test_b[1]"/>
<testcase classname="tests.unit.test_a" name="test_b[2]"><failure message="no"/></testcase>
<testcase classname="tests.unit.test_a" name="test_c"><skipped/></testcase>
<testcase classname="tests.unit.test_a" name="test_d"><error/></testcase>
</testsuite></testsuites>"""


def test_every_law_names_a_test_that_exists() -> None:
    for test in laws.laws().values():
        path, _, name = test.partition("::")
        functions = {node.name for node in ast.parse((TESTS / path).read_text()).body if hasattr(node, "name")}
        assert name in functions, test


def test_only_a_test_that_ran_and_passed_proves_its_law(tmp_path: Path) -> None:
    (tmp_path / "results.xml").write_text(RESULTS)
    assert laws.passed([tmp_path / "results.xml"]) == Counter({"unit/test_a.py::test_b": 1})
    every = dict.fromkeys(laws.laws().values(), 1)
    assert laws.untested(every) == []
    (sentence, test), *_ = laws.laws().items()
    (line,) = laws.untested({**every, test: 0})
    assert sentence in line
