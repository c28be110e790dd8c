"""What a run reads is pinned, and a start that failed leaves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from fedferret import __version__, models, runner
from fedferret.cli import app
from fedferret.comparison import commands
from fedferret.config import Recipe, load
from fedferret.core.errors import UserError
from fedferret.resident.pins import forget_data
from fedferret.resident.process import open_trainer
from fedferret.resident.site import read_site
from fedferret.runner import Interrupted, run
from fedferret.sites.join import JoinSettings, resolve_data
from tiny_runs import silent, tiny_recipe, tiny_tables, write_rows
from unit.written_grid import cell_of, save, written_grid

pytestmark = pytest.mark.slow(seconds=10)

REFUSING = "{% for m in messages %}{% if m.role == 'user' %}{{ raise_exception('no users') }}{% endif %}{% endfor %}"
ACCEPT = "--accept-changed-data"


def command(*words: str | Path) -> tuple[int, str, str]:
    """A command's exit code, output and errors."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert "Traceback" not in result.output, result.output
    return result.exit_code, result.stdout, result.stderr


def write(folder: Path, **changes: object) -> Path:
    """A recipe file."""
    (folder / "recipe.toml").write_text(tomli_w.dumps(tiny_tables(folder, **changes)))  # type: ignore[arg-type]
    return folder / "recipe.toml"


def stop_after(rounds: int) -> Callable[[str], None]:
    """Ctrl-C when a client of the next round begins."""
    seen: list[str] = []

    def begin(client: str) -> None:
        seen.append(client)
        if client and len([each for each in seen if each]) > 2 * rounds:
            raise KeyboardInterrupt

    return begin


def tiny_folder(folder: Path) -> Path:
    """The tiny model as a folder, with a tokenizer that can be edited."""
    models.save_folder(models.load("tiny"), folder / "model")
    return folder / "model"


def edit(path: Path) -> Callable[[], object]:
    """Put the file's content back."""
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    return lambda: path.write_bytes(before)


def test_a_file_that_was_read_is_a_file_that_is_pinned(tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path), write_rows(tmp_path)
    (tmp_path / "seen.jsonl").write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:4]))
    (tmp_path / "own.txt").write_text("Q: {instruction}\nA: {response}")
    recipe = write(
        tmp_path,
        model={"name": str(model)},
        data={"held_out_path": str(tmp_path / "seen.jsonl")},
        text={"template": str(tmp_path / "own.txt")},
        rounds=2,
    )
    out, resume = tmp_path / "run", ["run", recipe, "--out", tmp_path / "run"]
    with pytest.raises(Interrupted):
        run(load(recipe), out, silent, on_client=stop_after(1))
    start = json.loads((out / "events.jsonl").read_text().splitlines()[0])
    assert {kind: {Path(name).name for name in files} for kind, files in start["files"].items()} == {
        "data": {"rows.jsonl", "seen.jsonl"},
        "model": {path.name for path in model.iterdir() if path.suffix in (".json", ".jinja")},
        "template": {"own.txt"},
    }
    for path in (tmp_path / "own.txt", model / "tokenizer.json", model / "tokenizer_config.json"):
        restore = edit(path)
        for words in (resume, [*resume, ACCEPT]):
            code, _, line = command(*words)
            assert code == 2 and f"{path} was edited" in line and "restore it" in line
        restore()
    for path in (rows, tmp_path / "seen.jsonl"):
        restore = edit(path)
        code, _, line = command(*resume)
        assert code == 2 and f"{path} was edited" in line and ACCEPT in line
        restore()
    with rows.open("a") as file:
        file.write(json.dumps({"who": "Ann", "instruction": "The end?", "response": "Ann says: the end."}) + "\n")
    assert command(*resume)[0] == 2
    code, output, _ = command(*resume, ACCEPT)
    assert code == 0 and "The data is not what the run began with" in output
    page = (out / "report.html").read_text()
    assert "Changed data" in page and f"{rows} was edited" in page
    assert command("export", out, "--delta", tmp_path / "tuned.delta")[0] == 0


def test_a_start_that_failed_leaves_nothing_that_a_second_start_trips_over(tmp_path: Path) -> None:
    (tmp_path / "refusing.jinja").write_text(REFUSING)
    words = ["run", write(tmp_path, rounds=1), "--out", tmp_path / "deep" / "run"]
    code, _, line = command(*words, "--set", f"text.template={tmp_path / 'refusing.jinja'}")
    assert code == 2 and line.count("\n") == 1 and "no users" in line
    assert not (tmp_path / "deep").exists()
    # a start that was killed, or ended with exit code 1, leaves files: another recipe replaces them
    with pytest.raises(Interrupted):
        run(tiny_recipe(tmp_path, seed=9), tmp_path / "deep" / "run", silent, on_client=stop_after(0))
    assert (tmp_path / "deep" / "run" / "events.jsonl").exists()
    (tmp_path / "deep" / "run" / ".summary.json.0123abcd").write_text("")  # of a kill
    code, output, line = command(*words)
    assert code == 0 and "holds a start that came to nothing: it is replaced" in output, line
    # one with a finished round is another run's, and a folder with a file of somebody's is nobody's to empty
    code, _, line = command(*words, "--set", "seed=2")
    assert code == 2 and "holds a run with another seed (1 there, 2 here)" in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "environment.json").write_text("{}")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, _, line = command("run", tmp_path / "recipe.toml", "--out", tmp_path / "mine")
    assert code == 2 and "exists and is no run folder" in line and (tmp_path / "mine" / "notes.txt").exists()


def test_a_server_refuses_edited_held_out_rows_before_it_waits_for_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr")
    from flwr.app import Context, RecordDict

    from fedferret.sites import server_app

    class Begun(Exception):
        pass

    def begin(folder: Path, recipe: object) -> None:
        raise Begun

    out, settings = tmp_path / "run", tiny_recipe(tmp_path, rounds=1)
    run(settings, out, silent)
    (out / "server").mkdir()
    (out / "server" / "recipe.toml").write_text(settings.to_toml())
    edit(write_rows(tmp_path))
    monkeypatch.setattr(server_app, "Members", begin)
    for accepts, error, words in ((False, UserError, f"rows.jsonl was edited .*{ACCEPT}"), (True, Begun, "^$")):
        given = {"folder": str(out), "accept_changed_data": accepts}
        with pytest.raises(error, match=words):
            server_app.main(None, Context(1, 2, given, RecordDict(), {}))  # type: ignore[arg-type]  # it needs no grid


def test_a_run_that_began_before_text_cut_goes_on_with_the_rule_of_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = written_grid(tmp_path / "grid", ["A"], rounds=2)
    cell = cell_of(grid, tmp_path / "grid", "A", 1)
    path, plain = save(grid, tmp_path / "grid"), Recipe.to_toml
    (tmp_path / "recipe.toml").write_text(plain(cell.recipe).replace('cut = "response"\n', ""))
    older = load(tmp_path / "recipe.toml", ["text.cut=prompt"])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):  # by a fedferret without the setting
        patch.setattr(Recipe, "to_toml", lambda self: plain(self).replace('cut = "prompt"\n', ""))
        run(older, cell.folder, silent, on_client=stop_after(1))
    words = ["run", tmp_path / "recipe.toml", "--out", cell.folder]
    code, _, line = command(*words, "--set", "text.cut=response")
    assert code == 2 and "another text.cut ('prompt' there, 'response' here)" in line
    (row,) = commands.resolve(path, tmp_path / "grid", []).rows  # a comparison goes on with its runs, too
    assert row.recipe.text.cut == "prompt"
    code, output, line = command(*words)
    assert code == 0 and 'goes on with text.cut = "prompt", the rule of then' in output, line
    code, output, line = command("run", tmp_path / "recipe.toml", "--out", tmp_path / "other")
    assert code == 0 and "text.cut" not in output, line


def test_data_that_is_mended_before_the_first_round_is_accepted(tmp_path: Path) -> None:
    out, rows = tmp_path / "run", write_rows(tmp_path)
    with pytest.raises(Interrupted):
        run(tiny_recipe(tmp_path, rounds=1), out, silent, on_client=stop_after(0))
    edit(rows)
    assert run(tiny_recipe(tmp_path, rounds=1), out, silent)["status"] == "finished"


def test_a_start_that_is_refused_after_it_wrote_leaves_nothing(tmp_path: Path) -> None:
    """Recipe, events and first evaluation are on disk when round 1 begins."""
    out = tmp_path / "runs" / "one"

    def refuse(client: str) -> None:
        assert (out / "recipe.toml").exists() and (out / "events.jsonl").exists()
        raise UserError("no client takes part")

    with pytest.raises(UserError, match="no client takes part"):
        run(tiny_recipe(tmp_path), out, silent, on_client=refuse)
    assert not out.parent.exists()


def test_a_disk_without_room_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out, root = tmp_path / "run", tmp_path
    run(tiny_recipe(tmp_path, rounds=1), out, silent)
    before = sorted(root.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # no file may be longer
    try:
        refused = [command("export", out, *words) for words in (("--to", root / "x"), ("--delta", root / "x.delta"))]
        refused.append(command("report", out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for code, _, line in refused:
        assert code == 2 and line.count("\n") == 1 and "too large" in line, line
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_term_and_hup_end_a_run_as_ctrl_c_does(number: signal.Signals, code: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    seen: list[str] = []

    def stop(client: str) -> None:
        seen.append(client)
        if len(seen) == 4:
            os.kill(os.getpid(), number)
            time.sleep(60)  # the handler raises here

    def running(recipe: object, folder: Path, log: object, **options: object) -> object:
        return run(recipe, folder, silent, on_client=stop)  # type: ignore[arg-type]

    patch = pytest.MonkeyPatch()
    patch.setattr(runner, "run", running)
    before = signal.signal(number, signal.SIG_DFL)  # the tests may have been started with `nohup`
    try:
        ended, _, line = command("run", write(tmp_path), "--out", out)
    finally:
        patch.undo()
        signal.signal(number, before)
    assert ended == code and line.startswith("fedferret: stopped after round"), line
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted" and (out / "report.html").exists()
    assert "Resuming after round" in command("run", tmp_path / "recipe.toml", "--out", out)[1]


NASTY = "$\\frac{1}{$ \x1b[31m" + "x" * 5000


def test_names_of_any_content_and_length_are_shown_cut_and_printable(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_rows(tmp_path).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["category"] = ("$x_{$", NASTY, "\x00 $")[number % 3]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output, line = command("run", write(tmp_path, rounds=1), "--out", tmp_path / "run")
    assert code == 0, line
    for text in (
        output,
        *(path.read_text() for path in (tmp_path / "run").rglob("*") if path.suffix in (".svg", ".html")),
    ):
        assert "x" * 300 not in text and not {"\x1b", "\x00"} & set(text)


def test_the_version_is_printed_and_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert command("--version") == (0, f"fedferret {__version__}\n", "")
    path = write(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert command("show", path)[0] == 0


def test_a_site_pins_what_it_reads_and_only_once_it_was_accepted(tmp_path: Path) -> None:
    folder, rows, wrong = tmp_path / "ann", write_rows(tmp_path), tmp_path / "wrong.jsonl"
    wrong.write_text('{"instruction": "a"}\n')
    words = ["join", "127.0.0.1:1", "--name", "ann", "--insecure", "--folder", folder, "--data"]
    code, _, line = command(*words, wrong)
    assert code == 2 and 'no column "response"' in line and not (folder / "site.toml").exists()
    settings = {"address": "127.0.0.1:1", "name": "ann", "folder": folder, "insecure": True}
    shutil.copy(rows, tmp_path / "others.jsonl")
    resolve_data(JoinSettings(**settings, data=tmp_path / "others.jsonl"), folder)  # type: ignore[arg-type]
    assert resolve_data(JoinSettings(**settings, data=rows), folder) == str(rows)  # type: ignore[arg-type]
    open_trainer(folder)
    ((name, digest),) = read_site(folder).files["data"].items()
    assert name == str(rows) and digest == hashlib.sha256(rows.read_bytes()).hexdigest()
    before = (folder / "site.toml").read_bytes()
    restore = edit(rows)
    with pytest.raises(UserError, match=rf"{rows} was edited .* restore it, or give `fedferret join` {ACCEPT}"):
        open_trainer(folder)
    code, _, line = command(*words[:-1])
    assert code == 2 and f"{rows} was edited" in line and (folder / "site.toml").read_bytes() == before
    forget_data(folder)
    open_trainer(folder)
    assert (folder / "site.toml").read_bytes() != before
    restore()
    (folder / "runs" / "one").mkdir(parents=True)
    with pytest.raises(UserError, match="change it there"):
        resolve_data(JoinSettings(**settings, data=wrong), folder)  # type: ignore[arg-type]


def test_a_recipe_means_the_same_wherever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    tables = tiny_tables(project, rounds=1, model={"name": tiny_folder(project).name}, data={"path": "rows.jsonl"})
    (project / "recipe.toml").write_text(tomli_w.dumps({**tables, "text": {"template": "own.txt", "max_tokens": 64}}))
    (project / "own.txt").write_text("Q: {instruction}\nA: {response}")
    monkeypatch.chdir(tmp_path)
    code, _, line = command("run", "project/recipe.toml", "--out", "run", "--set", "seed=3")
    assert code == 0, line
    start = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert start["model"] == "model" and {"rows.jsonl"} == start["files"]["data"].keys()
    project.rename(tmp_path / "moved")  # another place: the run's own, and its base, are as they were
    monkeypatch.chdir(tmp_path / "moved")
    assert "nothing to do" in command("run", "recipe.toml", "--out", "../run", "--set", "seed=3")[1]
    run_folder = (tmp_path / "run").rename(tmp_path / "taken")
    monkeypatch.chdir(run_folder)
    code, _, line = command("export", run_folder, "--delta", tmp_path / "one.delta")
    assert code == 2 and line.count("\n") == 1 and not (tmp_path / "one.delta").exists()
    assert (
        command("export", run_folder, "--delta", tmp_path / "one.delta", "--base", tmp_path / "moved" / "model")[0] == 0
    )
    (tmp_path / "moved").rename(project)
    assert command("export", run_folder, "--to", tmp_path / "tuned")[0] == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    code, _, line = command("show", "project/recipe.toml")
    assert code == 2 and 'data.path: "rows.jsonl" is in' in line and "give the whole path" in line
