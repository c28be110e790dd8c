"""Recipes: valid files, resolved settings, and an error of one line for every invalid setting."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedferret.config import build_algorithm, from_tables, load, written
from fedferret.core.errors import UserError
from tiny_runs import tiny_recipe, tiny_tables

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_project_is_valid_and_survives_writing(path: Path) -> None:
    recipe = load(path)
    assert from_tables(tomllib.loads(recipe.to_toml())) == recipe


def test_a_resolved_recipe_has_every_setting(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    tables = tomllib.loads(recipe.to_toml())
    assert tables["algorithm"]["training"]["clip"] == 1.0
    assert tables["algorithm"]["bits"] == 1
    assert "coordinate_clip" not in tables["algorithm"]  # absent, as in the defaults
    assert tables["clients"]["min_clients"] == 1


def test_overrides_are_toml_else_strings(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(tiny_recipe(tmp_path).to_toml())
    sets = ["seed=7", "algorithm.coordinates = 2048", "algorithm.training.clip=none", "execution.engine=debug"]
    recipe: Any = load(file, sets)
    assert (recipe.seed, recipe.algorithm.coordinates, recipe.execution.engine) == (7, 2048, "debug")
    assert recipe.algorithm.training.clip is None
    assert load(file, ["seed=2", "seed=3"]).seed == 3


def test_execution_settings_are_not_part_of_a_runs_identity(tmp_path: Path) -> None:
    plain = tiny_recipe(tmp_path)
    assert tiny_recipe(tmp_path, execution={"engine": "debug", "tensorboard": True}).identity() == plain.identity()
    assert tiny_recipe(tmp_path, seed=2).identity() != plain.identity()
    assert tiny_recipe(tmp_path, text={"max_tokens": 32}).identity() != plain.identity()


def test_runs_from_before_there_was_a_cut_keep_their_rule_and_their_name(tmp_path: Path) -> None:
    older, newer = tiny_recipe(tmp_path, text={"cut": "prompt"}), tiny_recipe(tmp_path)
    assert "cut" not in older.identity_toml() and older.identity() != newer.identity()
    for recipe in (older, newer):
        assert written(tomllib.loads(recipe.identity_toml())).identity() == recipe.identity()


def test_runs_from_before_there_were_schedules_and_precisions_keep_their_name(tmp_path: Path) -> None:
    plain = {"name": "fedit", "training": {"steps": 1}}
    named = tiny_recipe(tmp_path, algorithm=plain).identity_toml()
    for later in ("dtype", "quantised", "schedule", "warmup", "rslora", "dora", "modules_to_save", "adapter"):
        assert f"{later} = " not in named, later
    for changed in ({"rslora": True}, {"training": {"steps": 1, "schedule": "cosine"}}):
        other = tiny_recipe(tmp_path, algorithm={**plain, **changed})
        assert other.identity_toml() != named and written(tomllib.loads(other.identity_toml())) == other
    assert 'dtype = "bf16"' in tiny_recipe(tmp_path, model={"dtype": "bf16"}, algorithm=plain).identity_toml()


@pytest.mark.parametrize("method", ["fedavg", "fedit", "ferret", "fedavg-top-k"])
@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_server_that_learns_nothing_or_backwards_is_refused(method: str, rate: float) -> None:
    with pytest.raises(UserError, match=r"server_learning_rate=\S+ must be greater than 0"):
        build_algorithm(method, {"server_learning_rate": rate})


def test_a_date_of_toml_is_its_text(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(tiny_recipe(tmp_path).to_toml())
    assert load(file, ["text.date=2026-11-28"]).text.date == "2026-11-28"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 3}, r'sede: there is no such setting; did you mean "seed"\?'),
        ({"seed": -1}, r"seed=-1: must be a whole number, at least 0"),
        ({"rounds": 0}, r"rounds=0: must be a whole number, at least 1"),
        ({"seed": 10**6000}, r"seed: must be a whole number, at least 0 and below"),
        ({"rounds": 2.5}, r"rounds=2\.5: must be a whole number"),
        ({"rounds": True}, r"rounds=True: must be a whole number"),
        ({"model": 3}, r"model=3: must be a table, \[model\]"),
        ({"clients": {"per_rond": 2}}, r'clients\.per_rond: there is no such setting; did you mean "per_round"\?'),
        ({"clients": {"per_round": 0}}, r"clients: per_round=0: must be greater than 0"),
        ({"clients": {"min_clients": 3}}, r"min_clients=3: more than per_round=2 are never asked"),
        ({"algorithm": {"name": "ferett"}}, r'no method is called "ferett": did you mean "ferret"\?'),
        ({"algorithm": {"name": "ferret", "bits": 3}}, r"algorithm\.bits=3: input should be"),
        ({"algorithm": {"name": "ferret", "preset": "papr"}}, r'there is no such preset; did you mean "paper"\?'),
        ({"algorithm": {"name": "fedavg", "preset": "paper"}}, r"there is no such preset; fedavg has none"),
        (
            {"algorithm": {"name": "fedavg", "training": {"lr": 1}}},
            r"algorithm\.training\.lr: there is no such setting",
        ),
        (
            {"algorithm": {"name": "fedpeptao", "layers": "all"}},
            r"algorithm\.layers=\"all\": input should be a valid number, or input should be 'spectrum'$",
        ),
        (
            {"algorithm": {"name": "slora", "sparse_training": 3}},
            r"algorithm\.sparse_training=3: input should be a table",
        ),
        ({"algorithm": {"name": "ferret", "over": 7}}, r"algorithm\.over=7: input should be"),
        (
            {"algorithm": {"name": "fedit", "modules": ["q", 7]}},
            r"algorithm\.modules\.1=7: input should be a valid string",
        ),
        (
            {"algorithm": {"name": "local-only"}, "pool": {"name": "median"}},
            r'pool\.name="median": the clients of local-only share nothing, so nothing is pooled',
        ),
        ({"algorithm": {"name": 3}}, r"algorithm\.name: this setting is missing or not a name"),
        ({"data": {"source": "chat"}}, r'no data source is called "chat": did you mean "chitchat"\?'),
        ({"data": {"pth": "x"}}, r'data\.pth: there is no such setting; did you mean "path"\?'),
        ({"text": {"max_tokens": 1}}, r"max_tokens=1: must be at least 8"),
        ({"evaluation": {"every": 0}}, r"every=0: must be greater than 0"),
        (
            {"execution": {"engine": "flwr"}},
            r"execution\.engine=\"flwr\": input should be 'in-process', 'debug', 'processes' or 'ray'",
        ),
    ],
)
def test_an_invalid_setting_is_an_error_of_one_line_that_names_it(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        from_tables(tiny_tables(tmp_path, **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["model", "data", "algorithm"])
def test_a_missing_table_is_named(missing: str, tmp_path: Path) -> None:
    tables = tiny_tables(tmp_path)
    del tables[missing]
    with pytest.raises(UserError, match=rf"\[{missing}\]: this table is missing"):
        from_tables(tables)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithm.coordinates", "must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("algorithm..bits=3", "must look like section.key=value"),
        ("seed.x=3", "seed is a setting, not a table"),
        ("algorithm.coordiantes=3", 'did you mean "coordinates"'),
        ("data=3", r"data=3: must be a table"),
    ],
)
def test_a_malformed_override_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(tiny_recipe(tmp_path).to_toml())
    with pytest.raises(UserError, match=message):
        load(file, [text])
