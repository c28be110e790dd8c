"""Requests are numbered: the same one has the same response, and one of before is refused."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason='certificates need pip install "fedferret[flower]"')

from contract.methods import reference
from fedferret.core.errors import RunError, UserError
from fedferret.core.exchanges import Train
from fedferret.engines.replay import SequenceNumbers
from fedferret.engines.trainer import Trainer
from fedferret.engines.transport import NoSeal, Request, Response
from fedferret.sites.pki import Authority
from fedferret.wire import codec
from toy_sites import BASE, RECIPE, toy_trainer
from toys import toy_clients
from unit.signed import METHOD, ROUNDS, issued, server_seal, signed_run, site_seal

RUN = hashlib.sha256(RECIPE.encode()).hexdigest()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return issued(tmp_path_factory.mktemp("signing"))


def request(sequence: int, **changes: Any) -> bytes:
    """A request for the first round."""
    head = {"run": RUN, "epoch": 0, "round": 1, "ticket": "t", "client": "a", "recipe": RECIPE, "base": BASE}
    state = {
        "version": 0,
        "fingerprint": "",
        "snapshot": b"",
        "records": (),
        "counted": 0,
        "counted_epoch": 0,
        "rebuild": False,
    }
    return codec.encode(Request(**{**head, **state, "private": b"", "body": Train(1), "sequence": sequence, **changes}))


def trainer(folder: Path, built: list[str] | None = None, seal: Any = None) -> Trainer:
    return toy_trainer(METHOD, ROUNDS, {"a": toy_clients()["a"]}, folder, "a", built=built, seal=seal)


def ask(site: Trainer, message: bytes) -> Response:
    response = codec.decode(site.handle(message))
    assert isinstance(response, Response)
    return response


@pytest.mark.parametrize("kind", ["signed", "insecure"])
def test_the_same_request_has_the_same_bytes_and_no_second_training_after_a_restart_too(
    kind: str, authority: Authority, tmp_path: Path
) -> None:
    seal = site_seal(authority, tmp_path) if kind == "signed" else NoSeal()
    message = server_seal(authority).close(request(5)) if kind == "signed" else request(5)
    built: list[str] = []
    site = trainer(tmp_path, built, seal)
    first = site.handle(message)
    assert site.handle(message) == first == trainer(tmp_path, built, seal).handle(message)
    assert built == [RECIPE], "the restarted trainer did not even build its model"


def test_a_request_of_before_is_refused_whatever_came_since_a_restart_too(tmp_path: Path) -> None:
    site = trainer(tmp_path)
    assert ask(site, request(5)).status == ask(site, request(7)).status == "done"
    for each in (site, trainer(tmp_path)):
        for old in (request(5), request(6), request(7, ticket="another")):
            late = ask(each, old)
            assert late.status == "refused" and re.search("number [567] came after number 7", late.reason)
    assert ask(site, request(7)).status == "done", "a refusal does not take the place of the response"


def test_a_request_to_another_site_and_one_without_a_number_count_for_nothing(tmp_path: Path) -> None:
    site = trainer(tmp_path)
    assert "this site works for a, and the request is for b" in ask(site, request(9, client="b")).reason
    for sequence in (0, -1, 1 << 63):
        assert "came with the number" in ask(site, request(sequence)).reason
    assert ask(site, request(5)).status == "done"


def test_a_trainer_that_was_killed_at_work_does_it_when_the_request_comes_again(tmp_path: Path) -> None:
    def killed(recipe: str, folder: Path | None) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(killed, tmp_path, "a").handle(request(5))
    assert ask(trainer(tmp_path), request(4)).status == "refused"
    assert ask(trainer(tmp_path), request(5)).status == "done"
    (tmp_path / "response.last").write_bytes((tmp_path / "response.last").read_bytes()[:-1])
    assert ask(trainer(tmp_path), request(5)).status == "done", "a damaged response is made again"
    (tmp_path / "request.last").write_bytes(b"")
    with pytest.raises(UserError, match=r"request\.last is damaged"):
        trainer(tmp_path)


def test_numbers_ascend_over_restarts_restored_folders_and_clocks_that_are_set_back(tmp_path: Path) -> None:
    path, now = tmp_path / "server" / "sequence", [1000.0]

    def numbers() -> SequenceNumbers:
        return SequenceNumbers(path, lambda: now[0])

    first = numbers()
    assert [first.next(), first.next()] == [1_000_000, 1_000_001]
    restored = path.read_bytes()
    now[0] = 900.0  # the clock is set back
    assert numbers().next() == 1_000_002
    now[0] = 2000.0
    newest = numbers().next()
    path.write_bytes(restored)  # an operator restores the folder of an earlier day
    now[0] = 2001.0
    assert numbers().next() > newest
    path.write_bytes(b"12a")
    with pytest.raises(RunError, match="sequence is damaged: delete it"):
        numbers()


def test_a_restored_server_goes_on_with_sites_that_worked_for_it_since(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    signed_run(authority, tmp_path, folder=folder, until=1)
    shutil.copytree(folder, tmp_path / "backup")
    shutil.copy(tmp_path / "sequence", tmp_path / "backup.sequence")
    signed_run(authority, tmp_path, folder=folder, until=3)
    shutil.rmtree(folder)
    shutil.move(tmp_path / "backup", folder)
    shutil.move(tmp_path / "backup.sequence", tmp_path / "sequence")
    run, _ = signed_run(authority, tmp_path, folder=folder)
    assert run.public == reference("ferret").public
