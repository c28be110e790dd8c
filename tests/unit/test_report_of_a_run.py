"""The report of a real run in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedferret import run
from fedferret.config import from_tables
from tiny_runs import tiny_tables
from unit.browser import assert_report_is_readable

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plots")]


def test_the_report_of_a_run_is_readable_on_a_desktop_and_on_a_phone(tmp_path: Path) -> None:
    tables = tiny_tables(tmp_path, evaluation={"local_only_clients": 1})
    run(from_tables(tables), tmp_path / "run", log=lambda line: None)
    assert_report_is_readable(tmp_path / "run" / "report.html")
