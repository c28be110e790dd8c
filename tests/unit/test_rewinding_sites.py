"""The epoch at a site: an earlier one is refused, a later one undoes what the server undid, nothing is lost unsaid."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contract.methods import METHODS, reference
from fedferret.core.errors import TooFewClients
from fedferret.wire import codec
from toy_sites import Direct, response, simulate_sites, sites, toy_trainer
from toys import Simulation, toy_clients
from unit.test_checkpoint import PowerCut, power_cut
from unit.test_rewinding import back, files

METHOD = METHODS["ferret-error-feedback"]  # every site has a private state


def run(root: Path, heard: list[tuple[bytes, bytes]] | None = None, **options: Any) -> Simulation:
    """The run of four rounds in ``root``, gone on with; ``heard`` collects the messages of site "a"."""

    def linked(data: Any) -> Direct:
        transport = sites(METHOD, 4, root / "sites")(data)

        def listen(site: str, message: bytes, content: bytes) -> list[bytes]:
            if heard is not None and site == "a":
                heard.append((message, content))
            return [content]

        transport.tamper = listen
        return transport

    return simulate_sites(METHOD, 4, linked, folder=root / "server", **options)


def site_a(folder: Path) -> Any:
    return toy_trainer(METHOD, 4, {"a": toy_clients()["a"]}, folder, "a")


def test_a_request_of_an_earlier_epoch_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, until=3)
    shutil.copytree(tmp_path / "server", tmp_path / "copy")
    back(tmp_path / "server", 2)
    heard: list[tuple[bytes, bytes]] = []
    run(tmp_path, heard)
    folder = tmp_path / "sites" / "a"
    before = files(folder / "runs")
    newest = codec.decode(heard[-1][0])
    old = codec.encode(replace(newest, epoch=0, sequence=newest.sequence + 1))
    refused = response(site_a(folder).handle(old))  # started again: the epoch is on disk
    assert refused.status == "refused" and files(folder / "runs") == before
    assert "the request is of epoch 0, and the run was rewound since, to epoch 1" in refused.reason
    shutil.rmtree(tmp_path / "server")
    (tmp_path / "copy").rename(tmp_path / "server")
    with pytest.raises(TooFewClients, match="the server's folder is of an earlier day"):
        run(tmp_path)


def test_a_copy_from_before_a_rewinding_goes_on_once_it_is_rewound_to_its_present_round(tmp_path: Path) -> None:
    """Sites know the epoch of another rewinding, and records that the copy never had."""
    run(tmp_path, until=3)
    shutil.copytree(tmp_path / "server", tmp_path / "copy")
    back(tmp_path / "server", 2, 1000.7)
    assert run(tmp_path).state.node.epoch == 1000
    shutil.rmtree(tmp_path / "server")
    (tmp_path / "copy").rename(tmp_path / "server")
    back(tmp_path / "server", 3, 1001.0)
    said: list[str] = []
    again = run(tmp_path, log=said.append)
    assert again.public == reference("ferret-error-feedback").public and not said
    assert [record.round for record in again.records] == [4] and not again.records[0].failures
    back(tmp_path / "server", 4, 900.0)  # the clock was set back
    assert run(tmp_path).state.node.epoch == 1002


def test_a_site_that_is_ahead_of_the_server_in_the_same_epoch_rebuilds(tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path, until=2)
    shutil.copytree(tmp_path / "server", tmp_path / "copy")
    run(tmp_path)
    shutil.rmtree(tmp_path / "server")
    (tmp_path / "copy").rename(tmp_path / "server")
    assert run(tmp_path, log=said.append).public == reference("ferret-error-feedback").public
    assert said == [f"{name}: its replica differs from the server's; it rebuilds from base and log" for name in "cba"]


def test_a_site_that_is_killed_while_it_goes_back_does_so_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    shutil.copytree(tmp_path / "sites" / "a", tmp_path / "ahead")
    back(tmp_path / "server", 1)
    heard: list[tuple[bytes, bytes]] = []
    run(tmp_path, heard, until=2)
    message, content = heard[0]
    expected = codec.decode(response(content).reply).payload
    with power_cut(monkeypatch, 10_000) as changes:
        site_a(shutil.copytree(tmp_path / "ahead", tmp_path / "counted")).handle(message)
    assert len(changes) > 4
    for moment in range(len(changes)):
        folder = Path(shutil.copytree(tmp_path / "ahead", tmp_path / str(moment)))
        with power_cut(monkeypatch, moment), pytest.raises(PowerCut):
            site_a(folder).handle(message)
        again = response(site_a(folder).handle(message))
        assert again.status == "done" and codec.encode(codec.decode(again.reply).payload) == codec.encode(expected)
        assert files(folder / "runs") == files(tmp_path / "counted" / "runs"), changes[moment]


def test_a_private_state_that_is_no_longer_held_begins_anew_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    notices: list[Any] = []
    run(tmp_path)
    back(tmp_path / "server", 2)
    for path in (tmp_path / "sites" / "a").rglob("*.state"):
        if int(path.stem) <= 2:
            path.unlink()
    again = run(tmp_path, log=said.append, on_message=notices.append)
    line = "the private state of round 2 is no longer held: it is begun again"
    assert said == [f"a: {line}"]
    told = [event for event in notices if event["what"] == "notice"]
    assert [(event["client"], event["round"], event["note"]) for event in told] == [("a", 3, line)]
    assert (
        not any(record.failures for record in again.records)
        and again.public != reference("ferret-error-feedback").public
    )
