"""A whole run of FedLog with two architectures: messages, figures, the baseline; and what is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedferret import recipe
from fedferret.algorithms import fedlog_bodies
from fedferret.build import check
from fedferret.config import Recipe
from fedferret.core.errors import UserError
from fedferret.export import export_folder
from fedferret.exportable import Exportable, exportable
from fedferret.models.private_body import image_weights
from fedferret.runner import run
from fedferret.tracking.events import read
from tiny_runs import silent


def resolved(**changes: Any) -> Recipe:
    """Two rounds on digits, three clients of some 40 images each."""
    tables: dict[str, Any] = {
        "rounds": 2,
        "model": {"name": "lenet5"},
        "data": {"source": "digits", "max_examples": 120, "max_held_out": 20},
        "clients": {"per_round": 3, "held_out": 0.2},
        "algorithm": {"name": "fedlog", "training": {"steps": 1}},
        "evaluation": {"every": 2, "batch_size": 64, "local_only_clients": 1},
    }
    tables["data"]["partition"] = {"kind": "iid", "clients": 3}
    rounds = changes.pop("rounds", tables.pop("rounds"))
    tables["evaluation"]["every"] = rounds
    return recipe(rounds=rounds, **{name: {**tables[name], **changes.get(name, {})} for name in tables})


def test_clients_of_two_architectures_are_scored_and_there_is_no_model_to_export(tmp_path: Path) -> None:
    settings = resolved(algorithm={"bodies": ["lenet5", "conv4"], "features": 8})
    run(settings, tmp_path / "run", silent)
    known = read(tmp_path / "run")
    first, last = (next(iter(known.evaluations[number].results.values())) for number in (0, 2))
    assert last["client-mean"] > first["client-mean"] and len(known.evaluations[2].clients) == 3
    for each in known.rounds.values():
        assert all(4 * 10 * 9 < up < 4 * 10 * 9 + 120 for up in each.bytes_up.values())
    assert len(known.baselines["local-only"].per_client) == 1  # of the recipe's model, whatever the run ended in
    for client in (None, min(known.evaluations[2].clients)):  # neither way may send the user to the other
        with pytest.raises(UserError, match="the plain model has no place for a projection"):
            export_folder(tmp_path / "run", tmp_path / "model", silent, client=client)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "No folder can hold what was tuned: the plain model has no place" in report and "--client NAME" not in report


def test_a_run_advises_the_export_that_works(tmp_path: Path) -> None:
    plain, frozen = {"normalise": "none"}, {"train": "head"}
    assert "has no place for" in exportable(resolved()).no_folder
    assert exportable(resolved(algorithm=plain)) == Exportable(global_model=False, no_folder="")
    settings = resolved(model=frozen, algorithm=plain, rounds=1)
    assert exportable(settings) == Exportable(global_model=True, no_folder="")
    run(settings, tmp_path / "run", silent)
    export_folder(tmp_path / "run", tmp_path / "model", silent)  # the one model of all clients
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_projection_that_memory_cannot_hold_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, body = resolved(algorithm={"features": 65_536}), image_weights("lenet5", 65_536)
    needed = 4 * (5 * body + 10 * 65_537)
    monkeypatch.setattr(fedlog_bodies, "physical_memory", lambda: needed)
    check(wide)
    monkeypatch.setattr(fedlog_bodies, "physical_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=rf"features=65536: a private body has {body:,} weights, .*lower features"):
        check(wide)


def test_a_frozen_body_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="rounds=2: the body is frozen"):
        check(resolved(model={"train": "head"}))
