"""Sites come and go: who is sampled when, what stays the same over kills and rewinding, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("cryptography")

from typer.testing import CliRunner

from contract.methods import METHODS
from fedferret.cli import app
from fedferret.config import Recipe
from fedferret.core.clients import ClientChanges
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.resident.process import open_trainer
from fedferret.rewind import rewind
from fedferret.runner import Interrupted, run
from fedferret.sites import serve, state
from fedferret.sites.credentials import read_server
from fedferret.sites.members import Members, requested
from fedferret.sites.pki import Authority
from fedferret.sites.serve import Server, ServeSettings
from fedferret.tracking import checkpoint, events
from fedferret.tracking.client_lists import clients_at
from site_folders import log_of, sites_recipe, write_sites
from tiny_runs import silent
from toy_sites import Direct, simulate_sites, sites
from toys import Simulation, simulate, toy_clients
from unit.test_rewinding import files

pytestmark = pytest.mark.slow(seconds=16)

CHANGES = {3: ClientChanges(added=("d",)), 5: ClientChanges(added=("e",), retired=("a",))}
ROUNDS = 6


def toy(name: str, **options: Any) -> Simulation:
    """Six rounds of two clients of three, later of those that ``CHANGES`` leave."""
    asked = options.pop("asked", CHANGES)
    world = {"data": toy_clients(5), "first": ("a", "b", "c"), "per_round": 2}
    return simulate(
        METHODS[name], ROUNDS, changes=lambda number: asked.get(number, ClientChanges()), **world, **options
    )


@pytest.mark.parametrize("name", ["fedavg", "ferret-error-feedback"])
def test_who_is_sampled_depends_on_seed_round_and_the_list_at_that_round_alone(name: str, tmp_path: Path) -> None:
    whole = toy(name)
    for record in whole.records:
        changes = ClientChanges()
        for number in range(1, record.round + 1):
            changes |= CHANGES.get(number, ClientChanges())
        names = changes.applied("abc")
        assert list(record.cohort) == Key.of(whole.seed, "cohort", record.round).sample(names, 2)
    later = {client for record in whole.records[4:] for client in record.cohort}
    assert "a" not in later and later & {"d", "e"}
    for stop in (2, 4):  # what took effect is in the checkpoint: it need not be asked for again
        folder = tmp_path / str(stop)
        first = toy(name, folder=folder, until=stop)
        rest = toy(name, folder=folder, asked={key: each for key, each in CHANGES.items() if key > stop})
        assert (rest.memory, first.history() + rest.history()) == (whole.memory, whole.history())


@pytest.mark.parametrize("name", ["fedavg", "ferret-error-feedback"])
def test_a_site_that_comes_catches_up_and_gives_the_bits_of_one_process(name: str, tmp_path: Path) -> None:
    world = {"data": toy_clients(5), "first": ("a", "b", "c"), "per_round": 2}
    over = simulate_sites(
        METHODS[name],
        ROUNDS,
        sites(METHODS[name], ROUNDS, tmp_path),
        changes=lambda number: CHANGES.get(number, ClientChanges()),
        **world,
    )
    assert (over.public, over.history()) == (toy(name).public, toy(name).history())
    assert not any(record.failures for record in over.records)


class Served:
    """A recipe over ann, bo and cleo, and trainers for them and dov: all that a server has but its processes."""

    def __init__(self, root: Path) -> None:
        self.folders = write_sites(root / "sites", 4)
        named = {name: self.folders[name] for name in ("ann", "bo", "cleo")}
        self.recipe: Recipe = sites_recipe(root, named, rounds=3, evaluation={"every": 3})
        self.trainers = {name: open_trainer(folder) for name, folder in self.folders.items()}

    def start(self, out: Path, **server: Any) -> Path:
        """What `serve` writes before the run begins."""
        known = {"doing": "serving", "process": os.getpid(), "secure": False, **server}
        state.write(out, "server", known)
        (out / "server" / "recipe.toml").write_text(self.recipe.to_toml())
        return out

    def run(self, out: Path, ask: Mapping[int, Sequence[str]] | None = None, stop: int = 0) -> None:
        """Go on with the run; commands are given as rounds begin, and Ctrl-C before a round is saved."""
        members = Members(out, self.recipe)

        def changes() -> ClientChanges:
            known = checkpoint.progress(out)
            for line in (ask or {}).get(known.round + 1 if known else 1, ()):
                assert command(line, out)[0] == 0, line
            return members.changes()

        with pytest.MonkeyPatch.context() as patch:
            save = checkpoint.save

            def stopping(folder: Path, run: Any) -> None:
                if run.round == stop:
                    raise KeyboardInterrupt
                save(folder, run)

            patch.setattr(checkpoint, "save", stopping)
            run(self.recipe, out, silent, transport=Direct(self.trainers), changes=changes)


def command(line: str, out: Path) -> tuple[int, str]:
    """Exit code and output of `fedferret sites VERB RUN ...`."""
    verb, *more = line.split()
    result = CliRunner().invoke(app, ["sites", verb, str(out), *more], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def cohorts(out: Path) -> list[str]:
    return [" ".join(each.clients) for each in events.read(out).rounds.values()]


def test_sites_come_and_go_in_a_run_and_kills_and_rewinding_keep_the_list(tmp_path: Path) -> None:
    served, ask = Served(tmp_path), {3: ["add dov --insecure", "retire ann"]}
    whole, out = served.start(tmp_path / "whole"), served.start(tmp_path / "out")
    served.run(whole, ask)
    with pytest.raises(Interrupted):
        served.run(out, ask, stop=3)  # the commands were given, and the round was not saved
    served.run(out)
    before, after = "ann bo cleo", "bo cleo dov"
    assert cohorts(out) == cohorts(whole) == [before, before, after]
    assert log_of(out, 3) == log_of(whole, 3) and not events.read(out).failures
    lists = events.read(out).lists
    assert [(each.round, each.added, each.retired) for each in lists] == [(3, ("dov",), ("ann",))]
    assert [clients_at(lists, number, before.split()) for number in (2, 3)] == [before.split(), after.split()]
    shown = [line.split(maxsplit=3) for line in command("list", out)[1].splitlines()[1:]]
    assert [(line[0], line[2], line[3].strip()) for line in shown] == [
        ("ann", "1", "retired from round 3 on"),
        ("bo", "1", "takes part"),
        ("cleo", "1", "takes part"),
        ("dov", "3", "takes part"),
    ]
    told = CliRunner().invoke(app, ["nodes", str(out)], env={"COLUMNS": "200"}).output.splitlines()
    assert [line.split()[-1] for line in told if line.startswith("ann")] == ["retired"]
    assert "0 of 1 connected; 1 retired" in CliRunner().invoke(app, ["status", str(out)]).output
    page = (out / "report.html").read_text()
    assert "Clients that came or were retired" in page and "<td>dov</td>" in page
    for path in (out / "server").glob("sites.json"):
        path.unlink()  # it asked for what has long taken effect
    rewind(out, 1, log=silent)
    served.run(out)
    assert cohorts(out) == [before, after, after]  # from then on, also where rounds are run again
    assert [(each.round, each.retired) for each in events.read(out).lists] == [(2, ("ann",))]
    assert not events.read(out).failures


def test_runs_of_one_recipe_under_the_same_certificates_are_kept_apart_at_a_site(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = Served(tmp_path)
    first, second = served.start(tmp_path / "first"), served.start(tmp_path / "second")
    served.run(first)
    rewind(first, 2, log=silent)  # requests of an earlier epoch are refused from now on: of this run
    served.run(first)
    kept = {name: files(folder / "runs") for name, folder in served.folders.items() if name != "dov"}
    served.run(second)
    assert log_of(first, 3) == log_of(second, 3)
    assert not events.read(second).failures and not events.read(second).notices
    for name, before in kept.items():
        now = files(served.folders[name] / "runs")
        assert before.items() <= now.items(), "nothing of the first run was changed"
        assert len({path.partition("/")[0] for path in now}) == 2
    stated = "ferret keeps 362 KB here between rounds, up to 1.09 MB in all on disk\n"
    assert capsys.readouterr().err.count(stated) == 9, "at each of three sites, of two runs and after the rewinding"


ADD, RETIRE = "add dov", "retire bo"


def finish(out: Path) -> None:
    text = (out / "server" / "recipe.toml").read_text()
    (out / "server" / "recipe.toml").write_text(text.replace("rounds = 3", "rounds = 1"))
    with events.EventLog(out)._path.open("a") as log:
        log.write('{"event": "end", "time": "2026-11-22T19:02:11+00:00", "rounds": 1}\n')


def least(number: int) -> Any:
    def change(out: Path) -> None:
        text = (out / "server" / "recipe.toml").read_text()
        (out / "server" / "recipe.toml").write_text(re.sub("min_clients = 1", f"min_clients = {number}", text))

    return change


def median(out: Path) -> None:
    text = (out / "server" / "recipe.toml").read_text()
    (out / "server" / "recipe.toml").write_text(text.replace('name = "mean"', 'name = "median"'))


def gone(out: Path) -> None:
    assert command("retire cleo", out)[0] == 0


def secured(out: Path) -> None:
    known = state.read(out, "server")
    state.write(out, "server", {**known, "secure": True, "pki": str(out.parent / "pki")})


def elsewhere(out: Path) -> None:
    secured(out)
    shutil.copytree(out.parent / "authority", out.parent / "pki")
    (out.parent / "pki" / "ca.key").unlink()


def damaged(out: Path) -> None:
    (out / "server" / "sites.json").write_text('{"added": "dov"}')


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder "out" of a served run after round 1, and an authority."""
    root = tmp_path_factory.mktemp("begun")
    served = Served(root)
    with pytest.raises(Interrupted):
        served.run(served.start(root / "out"), stop=2)
    authority = Authority.create(root / "authority", ["127.0.0.1"])
    for name in ("ann", "bo", "cleo"):
        authority.issue(name)
    return root


@pytest.fixture
def out(begun: Path, tmp_path: Path) -> Path:
    for name in ("out", "authority"):
        shutil.copytree(begun / name, tmp_path / name)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("line", "prepare", "words"),
    [
        ("add Dov!", silent, '"Dov!" cannot be the name of a site'),
        ("add ann", silent, "ann takes part in"),
        ("add cleo", gone, "a retired name does not come back: add the site under another name, such as cleo-b"),
        (ADD, silent, "is served without certificates: add --insecure"),
        (ADD, secured, "there are no certificates; make them with `fedferret pki init`"),
        (ADD, elsewhere, "no authority's key: run `fedferret pki issue dov` where it is, copy sites/dov/*.pub here"),
        (f"{ADD} --insecure", finish, "is finished, and no round is left"),
        (f"{ADD} --insecure", damaged, "server/sites.json is damaged"),
        ("retire cle0", silent, 'cle0: is no site of this run; did you mean "cleo"?'),
        ("retire cleo", gone, "cleo: is retired already; allowed: ann, bo"),
        (RETIRE, least(3), "bo: that leaves 2 sites, and clients.min_clients=3 are needed"),
        (RETIRE, median, 'bo: that leaves 2 sites; pool.name="median": of 2 clients'),
        (RETIRE, finish, "is finished, and no round is left"),
        (RETIRE, damaged, "server/sites.json is damaged"),
        ("list", damaged, "server/sites.json is damaged"),
        ("list", lambda out: shutil.rmtree(out / "server"), "no server was started in that folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_or_retired_is_refused_in_one_line_and_nothing_changes(
    line: str, prepare: Any, words: str, out: Path
) -> None:
    prepare(out)
    before = files(out.parent)
    code, said = command(line, out)
    assert code == 2 and words in said and said.count("\n") == 1, said
    after = files(out.parent)
    assert {name: after[name] for name in after if not name.endswith(".lock")} == {
        name: before[name] for name in before if not name.endswith(".lock")
    }


def test_a_stopped_runs_sites_change_at_the_next_start_with_their_certificates(out: Path) -> None:
    pki = out.parent / "authority"
    state.write(out, "server", {"doing": "stopped", "secure": True, "pki": str(pki)})
    code, said = command("add dov", out)
    assert (
        code == 0 and f"Archive:  {pki / 'sites' / 'dov.tar'}" in said and "; start `fedferret serve` again" in said
    ), said
    code, said = command("retire bo", out)
    assert code == 0 and "Revoked:  1 certificate of bo" in said and not (pki / "sites" / "bo").exists(), said
    code, said = command("retire cleo --keep-certificate", out)
    assert code == 0 and (pki / "sites" / "cleo").exists() and "have 2 of the 3 sites of clients.per_round" in said
    assert "valid until `fedferret pki revoke cleo`" in command("retire cleo", out)[1]
    recipe = Members(out, recipe_of(out))
    assert (recipe.names(), recipe.retired()) == (["ann", "dov"], ["bo", "cleo"])
    shown = command("list", out)[1]
    assert "takes part once it has connected" in shown and shown.count("retired from the next round on") == 2
    Authority(pki).issue("eve")  # for another run, or copied from where the authority's key is
    (pki / "ca.key").unlink()
    code, said = command("add eve", out)
    assert code == 0 and "issued before" in said and requested(out).added == ("dov", "eve")
    code, said = command("retire eve", out)
    assert code == 0 and "run `fedferret pki revoke eve` where it is, and copy revoked.crl here" in said


def recipe_of(out: Path) -> Recipe:
    from fedferret.config import load

    return load(out / "server" / "recipe.toml")


def test_a_site_that_was_added_is_waited_for_by_no_round_before_it_has_connected(out: Path) -> None:
    members = Members(out, recipe_of(out))
    assert command("add dov --insecure", out)[0] == command("retire bo", out)[0] == 0
    assert members.names() == ["ann", "cleo", "dov"] and members.awaited() == ["ann", "cleo"]
    assert members.effective({"ann"}) == ClientChanges(retired=("bo",))
    assert members.effective({"ann", "dov"}) == ClientChanges(("dov",), ("bo",)) == members.effective({"ann"})


class Link:
    """A stand-in for the SuperLink's control: the names of the nodes that it accepts."""

    def __init__(self) -> None:
        self.accepted: set[str] = set()

    def register(self, keys: Mapping[str, bytes]) -> None:
        self.accepted |= keys.keys()

    def unregister(self, keep: Sequence[str]) -> None:
        self.accepted &= set(keep)


def test_a_running_server_admits_a_site_that_comes_and_no_longer_one_that_was_retired(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki = out.parent / "authority"
    state.write(out, "server", {"doing": "serving", "process": os.getpid(), "secure": True, "pki": str(pki)})
    members, logged = Members(out, recipe_of(out)), list[str]()
    server, link = Server(out, ServeSettings(credentials=read_server(pki)), members.names, logged.append), Link()
    configured: list[int] = []
    server.proxy = SimpleNamespace(configure=lambda: configured.append(1))  # type: ignore[assignment]

    def admitted() -> set[str]:
        server._admit(link)  # type: ignore[arg-type]  # has the methods that are used
        return link.accepted

    assert admitted() == admitted() == {"ann", "bo", "cleo"} and len(configured) == 1
    assert command("add dov", out)[0] == command("retire bo", out)[0] == 0
    assert admitted() == {"ann", "cleo", "dov"} and len(configured) == 2
    shutil.copytree(pki / "sites" / "dov", out.parent / "dov")
    shutil.rmtree(pki / "sites" / "dov")
    monkeypatch.setattr(serve, "WRITE_EVERY", 0.0)
    assert command("retire cleo", out)[0] == 0
    assert (
        admitted() == admitted() == {"ann", "dov"} and len(logged) == 1 and logged[0].startswith("dov: no credentials")
    )
    with pytest.raises(UserError, match="is damaged"):
        (out / "server" / "sites.json").write_text(json.dumps({"added": [7]}))
        admitted()


def test_copies_of_the_servers_folder_that_are_rewound_in_turn_never_mix_private_states(tmp_path: Path) -> None:
    served = Served(tmp_path)
    out = served.start(tmp_path / "out")
    with pytest.raises(Interrupted):
        served.run(out, stop=3)
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    rewind(out, 1, "cleo", silent)
    served.run(out)  # rounds 2 and 3 again, without cleo: other states of ann and bo
    time.sleep(1.1)  # an epoch is a second
    rewind(copy, 2, None, silent)
    served.run(copy)
    assert events.read(copy).done == 3 and not events.read(copy).failures
    line = "the private state of round 2 is damaged, or of another copy of the run: it is begun again"
    assert sorted(events.read(copy).notices) == [(3, "ann", line), (3, "bo", line)]
