"""The event log of a run and the files computed from it: summary, environment, progress, TensorBoard."""

from __future__ import annotations

import doctest
import importlib.util
import io
import json
import logging
import math
from pathlib import Path

import pytest
from rich.console import Console

from fedferret.core.errors import UserError
from fedferret.tracking import units
from fedferret.tracking.environment import write_environment
from fedferret.tracking.events import FILE, FORMAT, EventLog, read, read_events, round_fields
from fedferret.tracking.folder import FILES, explain
from fedferret.tracking.progress import Progress
from fedferret.tracking.report import write_report
from fedferret.tracking.summary import summarise, write_summary
from fedferret.tracking.tensorboard import TensorBoard
from unit.written_run import NASTY, PARAMETERS, downgrade, evaluate, record, start, write_run


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    run = read(tmp_path)
    assert (run.done, run.planned, run.status) == (4, 4, "finished")
    assert run.start["model"] == "tiny"
    assert [run.evaluations[number].loss for number in range(5)] == [5.0, 4.75, 4.5, 4.25, 4.0]
    assert run.evaluations[0].results["held-out people"]["loss"] == 5.5
    assert run.baselines["local-only"].per_client == {"ann": 4.4, NASTY: 4.6}
    second = record(2, failing=("bob",))
    assert run.rounds[2].clients == second.cohort
    assert run.failures == [(2, second.failures[0])]
    assert run.rounds[2].loss == pytest.approx(3.8)
    assert (run.rounds[2].bytes_up, run.rounds[2].bytes_down) == (second.bytes_up, second.bytes_down)
    assert (run.rounds[2].seconds, run.rounds[2].seconds_local, run.rounds[2].seconds_overhead) == (5, 2, 3)
    assert run.rounds[2].fingerprint == "fingerprint2"
    assert run.ledger().up == 10 * 11


def test_every_line_is_a_json_object_with_its_kind_and_time(tmp_path: Path) -> None:
    write_run(tmp_path)
    for line in (tmp_path / FILE).read_text().splitlines():
        event = json.loads(line)
        assert event["event"] and event["time"].endswith("+00:00")


def test_the_start_event_has_the_format(tmp_path: Path) -> None:
    write_run(tmp_path)
    first, *others = read_events(tmp_path)
    assert (first["event"], first["format"]) == ("start", 2)
    assert not any("format" in event for event in others)


def test_the_event_log_of_fedferret_0_1_is_refused_with_the_version_that_reads_it(tmp_path: Path) -> None:
    write_run(tmp_path)
    downgrade(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    line = f'{tmp_path / FILE} was written by fedferret 0.1; pip install "fedferret==0.1.*" reads it'
    for action in (read_events, read, write_summary, write_report, EventLog):
        with pytest.raises(UserError) as refused:
            action(tmp_path)
        assert str(refused.value) == line
    assert (tmp_path / FILE).read_bytes() == before


def test_the_event_log_of_a_newer_fedferret_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"event": "start", "time": "", "format": FORMAT + 1}) + "\n")
    with pytest.raises(UserError, match=r"written by a newer fedferret \(format 3; this one reads 2\)"):
        read(tmp_path)


def test_resuming_discards_events_after_the_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, rounds=3, finished=False)
    log = EventLog(tmp_path)
    log.write("interrupted")
    assert read(tmp_path).status == "interrupted"
    log.write("resume", round=1)
    run = read(tmp_path)
    assert (list(run.rounds), list(run.evaluations), run.status) == ([1], [0, 1], "in progress")
    log.write("round", **round_fields(record(2, cohort=("eve",))))
    evaluate(log, 2, 1.5)
    run = read(tmp_path)
    assert run.rounds[2].clients == ("eve",)
    assert run.evaluations[2].loss == 1.5
    assert run.ledger().up_by_round == [30, 10]


def test_the_last_event_of_a_kind_and_round_holds(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    start(log)
    evaluate(log, 0, 5.0)
    evaluate(log, 0, 4.0)
    assert read(tmp_path).evaluations[0].loss == 4.0


def test_a_torn_last_line_is_skipped_and_cut_off_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path)
    before = read_events(tmp_path)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "round", "roun')
    assert read_events(tmp_path) == before
    with caplog.at_level(logging.WARNING):
        EventLog(tmp_path).write("end", rounds=4)
    assert "torn last line of 24 bytes" in caplog.text
    assert read_events(tmp_path)[:-1] == before


def test_a_damaged_line_is_refused_by_number(tmp_path: Path) -> None:
    start(EventLog(tmp_path))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": \n{"event": "end", "time": ""}\n')
    with pytest.raises(UserError, match=r"events\.jsonl, line 2 is not JSON"):
        read(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        read(tmp_path)


def test_nan_and_infinity_are_null_on_disk_and_nan_when_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    start(log)
    log.write(
        "evaluation", round=0, results={"x": {"loss": math.inf, "perplexity": math.nan, "tokens": 1}}, seconds=1.0
    )
    assert "NaN" not in (tmp_path / FILE).read_text() and "Infinity" not in (tmp_path / FILE).read_text()
    assert math.isnan(read(tmp_path).evaluations[0].loss)
    assert summarise(read(tmp_path))["eval_loss"] == [None]


def test_the_summary_adds_up(tmp_path: Path) -> None:
    write_run(tmp_path)
    summary = write_summary(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["method"] == "ferret"
    assert summary["rounds"] == summary["rounds_planned"] == 4
    assert summary["eval_rounds"] == [0, 1, 2, 3, 4]
    assert summary["eval_loss"] == [5.0, 4.75, 4.5, 4.25, 4.0] == summary["eval"]["held-out rows"]
    assert summary["eval"]["held-out people"][0] == 5.5
    assert summary["baselines"] == {"untuned": 5.0, "local-only": 4.5}
    assert summary["bytes_up_by_round"] == [30, 20, 30, 30]
    assert (summary["bytes_up"], summary["bytes_down"]) == (110, 84)
    assert summary["bytes_fedavg"] == 4 * PARAMETERS * (11 + 12)
    assert summary["bytes_up_per_client_round"] == 10
    assert summary["failures"] == 1
    assert summary["seconds"] == 4 * 5 + 5 * 2
    assert summary["seconds_local"] == 3 + 2 + 3 + 3
    assert summary["seconds"] == summary["seconds_local"] + summary["seconds_evaluation"] + summary["seconds_overhead"]
    assert 10_000_000 < summary["peak_memory_bytes"] < 1_000_000_000_000


def test_the_peak_memory_of_a_resumed_run_is_the_largest_of_its_processes(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"peak_memory_bytes": 1000000000000000}')
    assert write_summary(tmp_path)["peak_memory_bytes"] == 1_000_000_000_000_000


def test_before_the_first_round_there_is_a_summary_with_empty_lists(tmp_path: Path) -> None:
    start(EventLog(tmp_path))
    summary = write_summary(tmp_path)
    assert (summary["rounds"], summary["eval_loss"], summary["bytes_up"], summary["seconds"]) == (0, [], 0, 0)


def test_parallel_clients_do_not_make_the_overhead_negative() -> None:
    fields = round_fields(record(1, cohort=tuple("abcdefgh")))
    assert (fields["seconds_local"], fields["seconds_overhead"]) == (8, 0)


def test_the_environment_names_machine_and_versions(tmp_path: Path) -> None:
    found = json.loads(write_environment(tmp_path).read_text())
    assert found["cores"] >= 1 and found["memory_bytes"] > 100_000_000 and found["processor"]
    assert found["packages"]["torch"] and found["python"].startswith("3.")


def test_the_readme_names_every_file(tmp_path: Path) -> None:
    text = explain(tmp_path).read_text()
    assert all(name in text for name in FILES)


def progress_output() -> str:
    output = io.StringIO()
    console = Console(file=output, width=100)
    with Progress(2, console=console) as progress:
        progress.evaluated(0, 5.0)
        progress.message("[bold]a name[/bold]")
        for number in (1, 2):
            progress.round(number, 3)
            progress.client("[red]ann[/red]", 0)
            progress.step(1, 4, 4.5)
            progress.finished_round(record(number, failing=("bob",)), 51 * number)
    return output.getvalue()


def test_progress_in_a_file_is_plain_lines() -> None:
    lines = progress_output().splitlines()
    assert lines[0] == "round 0/2: held-out loss 5.000"
    assert lines[1] == "[bold]a name[/bold]"
    assert lines[2] == "round 1: client bob failed (local): bob lost <b>power</b>"
    assert lines[3].startswith("round 1/2: 2 of 3 clients replied in 5 s, 51 B so far, ")
    assert lines[5].endswith("102 B so far, done")
    assert len(lines) == 6 and "\x1b" not in "".join(lines)


def test_progress_on_a_terminal_shows_round_client_step_and_loss() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with Progress(2, console=console) as progress:
        progress.evaluated(0, 5.0)
        progress.round(1, 3)
        progress.client("[red]ann[/red]", 1)
        progress.step(1, 4, 4.5)
        console.print(progress)
    for piece in ("round 1/2", "client 2/3", "step 1/4", "loss 4.500", "[red]ann[/red]", "held-out loss 5.000", "left"):
        assert piece in output.getvalue(), piece


def test_the_done_fraction_grows_with_every_step_and_counts_from_the_checkpoint() -> None:
    progress = Progress(12, done=10, console=Console(file=io.StringIO()))
    seen = [progress.fraction]
    for number in (11, 12):
        progress.round(number, 2)
        for client in (0, 1):
            progress.client("x", client)
            for step in (1, 2):
                progress.step(step, 2, 1.0)
                seen.append(progress.fraction)
        progress.finished_round(record(number), 0)
    assert seen == [index / 8 for index in range(9)]


def test_the_examples_of_units_hold() -> None:
    assert doctest.testmod(units) == (0, 5)


def test_tensorboard_has_the_same_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for number in (1, 2):
        board.write("round", **round_fields(record(number)))
        results = {"rows": {"loss": 5.0 - number, "perplexity": 2.0, "tokens": 1}}
        board.write("evaluation", round=number, results=results, seconds=1.0)
    board.write("end", rounds=2)
    board.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert [(point.step, point.value) for point in curves.Scalars("loss/rows")] == [(1, 4.0), (2, 3.0)]
    assert [point.value for point in curves.Scalars("bytes/up")] == [30, 60]


def test_tensorboard_without_its_package_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
