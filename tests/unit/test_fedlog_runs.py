"""A whole run of FedLog with two architectures: messages, figures, the baseline; and what is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedferret import recipe
from fedferret.build import check
from fedferret.config import Recipe
from fedferret.core.errors import UserError
from fedferret.export import export_folder
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
    return recipe(**{name: {**tables[name], **changes.get(name, {})} if name != "rounds" else 2 for name in tables})


def test_clients_of_two_architectures_are_scored_and_there_is_no_model_to_export(tmp_path: Path) -> None:
    settings = resolved(algorithm={"bodies": ["lenet5", "conv4"], "features": 8})
    run(settings, tmp_path / "run", silent)
    known = read(tmp_path / "run")
    first, last = (next(iter(known.evaluations[number].results.values())) for number in (0, 2))
    assert last["client-mean"] > first["client-mean"] and len(known.evaluations[2].clients) == 3
    for each in known.rounds.values():
        assert all(4 * 10 * 9 < up < 4 * 10 * 9 + 120 for up in each.bytes_up.values())
    assert len(known.baselines["local-only"].per_client) == 1  # of the recipe's model, whatever the run ended in
    with pytest.raises(UserError, match="fedlog has no global model"):
        export_folder(tmp_path / "run", tmp_path / "model", silent)


def test_a_frozen_body_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="rounds=2: the body is frozen"):
        check(resolved(model={"train": "head"}))
