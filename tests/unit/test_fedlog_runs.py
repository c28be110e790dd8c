"""Whole runs of FedLog over texts: an adapter as private body, its figures, and what is refused beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedferret.build import check
from fedferret.core.errors import UserError
from fedferret.export import export_folder
from fedferret.runner import run
from fedferret.tracking.events import read
from tiny_runs import silent
from unit.test_classification_runs import TRAINING, resolved

FEDLOG = {"name": "fedlog", "over": {"name": "ssf"}, "features": 8, "training": TRAINING}


def test_every_client_learns_with_an_adapter_of_its_own_and_there_is_no_model_to_export(tmp_path: Path) -> None:
    settings = resolved(tmp_path, model={"name": "tiny-encoder"}, algorithm=FEDLOG)
    run(settings, tmp_path / "run", silent)
    known = read(tmp_path / "run")
    first, last = (known.evaluations[number].results["rows"] for number in (0, 6))
    assert last["client-mean"] > 0.7 > first["client-mean"] and set(known.evaluations[6].clients) == {
        "c0", "c1", "c2", "c3"
    }  # fmt: skip
    for round in known.rounds.values():
        assert all(4 * 3 * 9 < up < 4 * 3 * 9 + 120 for up in round.bytes_up.values())
    with pytest.raises(UserError, match="fedlog has no global model"):
        export_folder(tmp_path / "run", tmp_path / "model", silent)


def test_a_frozen_body_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rounds=6: the body is frozen"):
        check(resolved(tmp_path, model={"name": "tiny-encoder", "train": "head"}, algorithm={"name": "fedlog"}))
