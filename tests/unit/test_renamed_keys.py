"""Old recipe keys are read for one version, with one line of warning each."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedferret.config import from_tables
from fedferret.core.errors import UserError
from tiny_runs import tiny_tables


def test_an_old_key_means_what_its_new_name_means_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ferret = {"name": "ferret", "coordinates": 64}
    old = tiny_tables(
        tmp_path,
        algorithm={**ferret, "largest_of": 8},
        clients={"per_round": 2, "min_answers": 2},
        text={"learn": "everything"},
    )
    new = tiny_tables(
        tmp_path,
        algorithm={**ferret, "group_size": 8},
        clients={"per_round": 2, "min_clients": 2},
        text={"train_on": "all"},
    )
    assert from_tables(new) == from_tables(new) and not caplog.records
    with caplog.at_level(logging.WARNING):
        assert from_tables(old) == from_tables(new)
    assert [record.getMessage() for record in caplog.records] == [
        f"{before} is called {after} since fedferret 0.2; the old name is read until 0.3"
        for before, after in (
            ("clients.min_answers", "clients.min_clients"),
            ("text.learn", "text.train_on"),
            ("algorithm.largest_of", "algorithm.group_size"),
        )
    ]


def test_both_names_of_a_key_are_one_line(tmp_path: Path) -> None:
    tables = tiny_tables(tmp_path, clients={"per_round": 2, "min_answers": 1, "min_clients": 1})
    with pytest.raises(UserError, match=r"clients.min_answers: this is the old name of clients.min_clients"):
        from_tables(tables)


def test_the_preset_that_became_a_method_is_that_method(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"coordinates": 12, "training": {"learning_rate": 0.1}}
    old = tiny_tables(tmp_path, algorithm={"name": "ferret", "preset": "paper-code", **settings})
    new = tiny_tables(tmp_path, algorithm={"name": "ferret-published", **settings})
    with caplog.at_level(logging.WARNING):
        assert from_tables(old) == from_tables(new)
    assert ['"paper-code" of ferret is the method "ferret-published"' in line for line in caplog.messages] == [True]


@pytest.mark.parametrize(
    "gone", [{"budget": "largest-block"}, {"coordinate_clip": 1.0}, {"keys": "fixed-pool"}, {"scale": "published-code"}]
)
def test_a_setting_that_is_gone_names_what_to_do(gone: dict[str, object], tmp_path: Path) -> None:
    tables = tiny_tables(tmp_path, algorithm={"name": "ferret", **gone})
    with pytest.raises(UserError, match=rf"algorithm.{next(iter(gone))}.*set algorithm.name=\"ferret-published\""):
        from_tables(tables)


def test_a_setting_that_is_gone_is_read_where_it_changed_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in every recipe that fedferret 0.1 wrote, with all its defaults."""
    old = tiny_tables(tmp_path, algorithm={"name": "ferret", "budget": "total", "coordinate_clip": "none"})
    with caplog.at_level(logging.WARNING):
        assert from_tables(old) == from_tables(tiny_tables(tmp_path, algorithm={"name": "ferret"}))
    assert ["is gone since fedferret 0.2" in line for line in caplog.messages] == [True, True]
