"""The report as a reader sees it: opened from disk in Chromium, at the widths of a phone and a desktop."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedferret.tracking.events import EventLog
from fedferret.tracking.report import write_report
from unit.browser import PHONE, Browser, assert_report_is_readable
from unit.written_run import NASTY, start, write_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plots")]


def test_the_report_of_a_run_is_readable(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert_report_is_readable(write_report(tmp_path))


def test_the_report_before_the_first_round_is_readable(tmp_path: Path) -> None:
    start(EventLog(tmp_path), model="a-model-with-a-name-that-does-not-end" * 4)
    assert_report_is_readable(write_report(tmp_path), plots=())


def test_the_plots_follow_a_dark_theme(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = write_report(tmp_path)
    with Browser() as browser:
        light, dark = (browser.open(path, PHONE, dark=dark)["plots"] for dark in (False, True))
    for name in light:
        assert light[name]["colours"] and not set(light[name]["colours"]) & set(dark[name]["colours"]), name


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (("</h1>", "</h1><script>console.error('oh')</script>"), "script"),
        (("</h1>", '</h1><img src="http://example.invalid/a.png" alt="">'), "Content Security Policy|requests"),
        (("</h1>", '</h1><div style="width: 500px">wide</div>'), "px wide"),
        (("</h1>", '</h1><p style="font-size: 11px">small</p>'), "text of 11"),
        (('id="plot-sampled"', 'id="plot-time"'), "used twice"),
        (('<svg role="img"', '<svg style="display: none" role="img"'), "has the size"),
        (("font-size: 11px;", "font-size: 5px;"), "has text of"),
    ],
)
def test_the_check_finds_what_makes_a_report_unreadable(tmp_path: Path, damage: tuple[str, str], error: str) -> None:
    write_run(tmp_path)
    path = write_report(tmp_path)
    page = path.read_text()
    assert damage[0] in page and NASTY not in page
    path.write_text(page.replace(*damage))
    with pytest.raises(AssertionError, match=error):
        assert_report_is_readable(path)
