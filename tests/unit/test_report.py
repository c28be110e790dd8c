"""The report shows a run in any state, and escapes everything from the data."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedferret.core.errors import UserError
from fedferret.tracking.events import EventLog, round_fields
from fedferret.tracking.report import write_report
from unit.written_run import NASTY, evaluate, record, start, write_run

pytestmark = pytest.mark.usefixtures("plots")

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Parses a page strictly: every tag is closed in order. Collects the text, the tags and the attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(folder: Path) -> Reader:
    return Reader(write_report(folder).read_text())


def test_the_report_shows_the_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    text = report(tmp_path).text
    for piece in (
        "Ferret tuned tiny (1,000 weights) on toy, held by 9 clients: 4 of 4 rounds; seed 1.",
        "finished",
        "5.000 → 4.000",
        "baseline: local-only 4.500 this run is 0.500 better",
        "up, per client and round",
        "FedAvg: 4.00 KB",
        "FedAvg: 92.0 KB, 470× as much",
        "bob lost <b>power</b>",
        "fedferret export",
        f'How the data were read read as: instruction, column "{NASTY}"',
        "seed = 1",
        "torch",
    ):
        assert piece in text, piece


def test_the_report_is_one_file_with_every_plot(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = report(tmp_path)
    assert [attributes["id"] for tag, attributes in page.tags if tag == "figure"] == [
        "plot-loss-by-round",
        "plot-loss-by-bytes",
        "plot-sampled",
        "plot-time",
    ]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "loss-by-bytes.svg",
        "loss-by-round.svg",
        "sampled.svg",
        "time.svg",
    ]
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.filterwarnings("error")
def test_names_from_the_data_never_become_markup(tmp_path: Path) -> None:
    write_run(tmp_path)
    log = EventLog(tmp_path)
    start(log, method=NASTY, model=NASTY, data=NASTY, rounds=1)
    log.write("evaluation", round=0, results={NASTY: {"loss": 2.0, "perplexity": 7.4, "tokens": 1}}, seconds=1.0)
    log.write("baseline", name=NASTY, loss=3.0, per_client={})
    log.write("round", **round_fields(record(1, failing=(NASTY,))))
    log.write("evaluation", round=1, results={NASTY: {"loss": 1.0, "perplexity": 2.7, "tokens": 1}}, seconds=1.0)
    page = report(tmp_path)
    assert "script" not in {tag for tag, _ in page.tags} and "b" not in {tag for tag, _ in page.tags}
    assert page.text.count(NASTY) > 8  # shown as it is, dollars and all
    assert page.text.count(NASTY[:21] + "…") == 4  # in the legends
    for svg in (tmp_path / "plots").iterdir():
        assert "<script" not in svg.read_text()


@pytest.mark.filterwarnings("error")
def test_a_name_in_any_script_is_drawn(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    start(log)
    log.write("evaluation", round=0, results={"問答 ☃": {"loss": 2.0, "perplexity": 7.4, "tokens": 1}}, seconds=1.0)
    assert "問答 ☃" in report(tmp_path).text


def test_rounds_that_are_no_numbers_are_one_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    events = tmp_path / "events.jsonl"
    events.write_text(events.read_text().replace('"round": 1,', '"round": "1",').replace('"round":1,', '"round":"1",'))
    with pytest.raises(UserError, match=r"events\.jsonl, line \d+ is damaged"):
        write_report(tmp_path)


def test_the_same_events_give_the_same_plots(tmp_path: Path) -> None:
    plots = []
    for name in ("a", "b"):
        write_run(tmp_path / name)
        write_report(tmp_path / name)
        plots.append([path.read_bytes() for path in sorted((tmp_path / name / "plots").iterdir())])
    assert plots[0] == plots[1]


def test_an_unfinished_run_has_a_report_of_the_rounds_so_far(tmp_path: Path) -> None:
    write_run(tmp_path, rounds=2, finished=False)
    text = report(tmp_path).text
    assert "in progress after round 2 of 4" in text
    assert "5.000 → 4.500" in text


@pytest.mark.parametrize("events", ["start", "evaluated"])
def test_a_run_before_its_first_round_has_a_report(tmp_path: Path, events: str) -> None:
    log = EventLog(tmp_path)
    start(log)
    if events == "evaluated":
        evaluate(log, 0, 5.0)
    page = report(tmp_path)
    assert "0 of 4 rounds" in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == (events == "evaluated")


def test_a_diverged_run_has_a_report(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    start(log)
    for number in range(3):
        scores = {"loss": float("nan"), "perplexity": float("inf"), "tokens": 1}
        log.write("evaluation", round=number, results={"rows": scores}, seconds=1.0)
        log.write("round", **round_fields(record(number + 1)))
    assert "none → none" in report(tmp_path).text


def test_a_plot_of_thousands_of_clients_and_hundreds_of_rounds_is_small(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    start(log, rounds=200, clients=4000)
    for number in range(1, 201):
        cohort = tuple(f"client {(number * 37 + index * 911) % 4000}" for index in range(20))
        log.write("round", **round_fields(record(number, cohort, failing=cohort[:1])))
    report(tmp_path)
    assert (tmp_path / "plots" / "sampled.svg").stat().st_size < 500_000
    shown = (tmp_path / "plots" / "sampled.svg").read_text()
    assert re.search(r"clients, \d+ per cell", shown)


def test_a_folder_without_a_run_is_refused_and_not_changed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_log_without_a_start_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(UserError, match=r"events\.jsonl has no start of a run"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_data_that_was_accepted_as_changed_is_shown_by_file_and_round(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    start(log, files={"data": {"rows.jsonl": "a" * 64}}, data_fingerprint="d" * 64)
    log.write("round", **round_fields(record(1)))
    log.write("round", **round_fields(record(2)))
    log.write("resume", round=2)
    assert "Changed data" not in report(tmp_path).text
    log.write("resume", round=2, files={"data": {"rows.jsonl": "b" * 64}}, data_fingerprint="e" * 64)
    assert "2 rows.jsonl was edited (SHA-256 aaaaaaaaaaaa… then, bbbbbbbbbbbb… now)" in report(tmp_path).text
    log.write("resume", round=1, files={"data": {"rows.jsonl": "b" * 64}}, data_fingerprint="f" * 64)
    text = report(tmp_path).text
    assert "1 rows.jsonl was edited" in text  # the rounds after round 1 are those with the changed data now
    assert "1 the examples are others (SHA-256 eeeeeeeeeeee… then, ffffffffffff… now)" in text
