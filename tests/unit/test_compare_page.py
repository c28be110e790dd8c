"""The page of a comparison has the content of its table, and a phone can show it with the methods of a whole paper."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from fedferret.comparison.commands import gather
from fedferret.comparison.page import write_page
from fedferret.comparison.plots import COLOURS, MARKS, styles
from fedferret.comparison.run_status import record_outcome
from fedferret.comparison.table import write_tables
from fedferret.comparison.worker import Outcome
from fedferret.tracking.plots import LIGHT
from unit.browser import PHONE, Browser, assert_report_is_readable
from unit.test_report import Reader
from unit.written_grid import cell_of, write_cell, written_grid
from unit.written_run import NASTY

pytestmark = pytest.mark.usefixtures("plots")

PLOTS = ("loss-by-round", "loss-by-bytes", "loss-by-seconds", "front")


def write_comparison(folder: Path, count: int = 3) -> Path:
    """The page of ``count`` methods and two seeds. One method's name contains markup, and one run diverged."""
    labels = [f"Method {number}" for number in range(count - 1)] + [NASTY]
    grid = written_grid(folder, labels)
    for number, label in enumerate(labels):
        for seed in grid.seeds:
            final = 3.0 + 0.1 * number + 0.05 * seed
            losses = {0: 5.0, 1: 0.5 * (5.0 + final), 2: final}
            write_cell(cell_of(grid, folder, label, seed), losses, each=10 ** (1 + (count - number) % 7))
    late = cell_of(grid, folder, labels[0], 2)
    (late.folder / "summary.json").write_text(json.dumps({"status": "in progress"}))
    record_outcome(late, Outcome("diverged", "the loss is <b>nan</b>"), 1, 1.0)
    comparison = gather(grid, folder)
    write_tables(comparison)
    return write_page(comparison)


def test_the_page_has_the_table_the_checks_and_the_left_out_runs(tmp_path: Path) -> None:
    path = write_comparison(tmp_path)
    text = Reader(path.read_text()).text
    for piece in (
        "3 methods on tiny",
        "6 of 6 runs done",
        "lowest loss",
        "Method 0, seed 2: diverged: the loss is <b>nan</b>",
        "1 of 2",
        "5 runs started from the same weights.",
        "Batch size: 4.",
        NASTY,
        "seeds = [",
    ):
        assert piece in text, piece


def test_the_page_is_one_file_with_links_to_the_runs(tmp_path: Path) -> None:
    page = Reader(write_comparison(tmp_path).read_text())
    figures = [attributes["id"] for tag, attributes in page.tags if tag == "figure"]
    assert figures == [f"plot-{name}" for name in PLOTS]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links[0] == "runs/method-0/seed-1/report.html" and len(links) == 5
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(
        f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")
    )


def test_the_plots_files_name_every_method_and_do_not_depend_on_the_date(tmp_path: Path) -> None:
    path = write_comparison(tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "plots").iterdir()}
    assert b"Method 1" in before["front.svg"] and b"&lt;script&gt;" in before["loss-by-round.svg"]
    path.unlink()
    write_comparison(tmp_path)
    assert {file.name: file.read_bytes() for file in (tmp_path / "plots").iterdir()} == before


def test_a_grid_before_its_first_run_has_a_page(tmp_path: Path) -> None:
    text = Reader(write_page(gather(written_grid(tmp_path, ["A"]), tmp_path)).read_text()).text
    assert "0 of 2 runs done" in text and "no run is finished" in text and "waiting" in text


def test_two_dozen_methods_have_different_styles(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, [f"M{number}" for number in range(24)])
    styled = styles(gather(grid, tmp_path))
    assert len(set(styled.values())) == len(COLOURS) * len(MARKS) == 24
    for theme in (0, 1):
        for one, other in combinations([pair[theme] for pair in COLOURS.values()], 2):
            assert distance(one, other) > 60, (one, other)
    assert not {light for light, _ in COLOURS.values()} & set(LIGHT.values())


def distance(one: str, other: str) -> float:
    """The perceived distance of two colours by the "redmean" formula: 765 from black to white."""
    (r, g, b), (s, h, c) = ([int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in (one, other))
    red = (r + s) / 2
    return float(((2 + red / 256) * (r - s) ** 2 + 4 * (g - h) ** 2 + (2 + (255 - red) / 256) * (b - c) ** 2) ** 0.5)


@pytest.mark.slow
def test_the_page_of_sixteen_methods_is_readable(tmp_path: Path) -> None:
    assert_report_is_readable(write_comparison(tmp_path, 16), plots=PLOTS)


@pytest.mark.slow
def test_the_plots_follow_a_dark_theme(tmp_path: Path) -> None:
    path = write_comparison(tmp_path)
    with Browser() as browser:
        light, dark = (browser.open(path, PHONE, dark=dark)["plots"] for dark in (False, True))
    for name in PLOTS:
        assert light[name]["colours"] and not set(light[name]["colours"]) & set(dark[name]["colours"]), name
