"""Every recipe that comes with the project is one: it resolves, without data or model, and says what its name says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedferret.comparison.grid import Grid, resolve
from fedferret.config import from_tables
from fedferret.recipe_file import read_tables

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.toml"))
PAPER = [path for path in RECIPES if path.parent.name == "paper"]
TABLE_2 = ["FedPTuning", "FedPrompt", "FedIT-SGD", "FedIT", "FedZO", "FedKSeed", "FedAvg"]
LARGE = ["FedIT", "FedZO", "FedKSeed", "FedAvg"]
CODE = "Ferret, paper's code"
FERRET = ["Ferret, paper's text", CODE]
MODELS = {"1.3b": "LLaMA-1B-dj-refine-150B", "3b": "open_llama_3b", "7b": "Llama-2-7b-hf", "13b": "Llama-2-13b-hf"}
SOURCES = {
    "table2-ni": "natural-instructions",
    "table2-dolly": "dolly",
    "code-alpaca": "code-alpaca",
    "gsm8k": "gsm8k",
}


@cache
def grid(name: str) -> Grid:
    return resolve(read_tables(FOLDER / "paper" / f"{name}.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_recipe_resolves(path: Path) -> None:
    tables = read_tables(path)
    assert resolve(tables).rows if "methods" in tables else from_tables(tables)


def test_the_papers_tables_are_all_there() -> None:
    two_sizes = [(name, size) for name in SOURCES for size in MODELS if ("table2" in name) == (size in ("1.3b", "3b"))]
    assert [path.stem for path in PAPER] == sorted(f"{name}-{size}" for name, size in two_sizes)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_table_of_the_paper_has_its_rows_data_model_and_seeds(path: Path) -> None:
    name, _, size = path.stem.rpartition("-")
    resolved = grid(path.stem)
    assert [row.label for row in resolved.rows] == (TABLE_2 if "table2" in name else LARGE) + FERRET
    assert len(resolved.seeds) == 4
    for row in resolved.rows:
        recipe = row.recipe
        assert recipe.data_source == SOURCES[name] and recipe.model.name.endswith(MODELS[size])
        assert (recipe.text.template, recipe.text.max_tokens) == ("alpaca", 1024)
        assert recipe.evaluation.metrics[:2] == ("loss", "rouge-l") and recipe.evaluation.max_new_tokens == 128
        wanted = "ferret-published" if row.label == CODE else row.label.lower().partition(",")[0]
        assert recipe.algorithm.name == wanted


@pytest.mark.parametrize(
    ("name", "others", "ferret", "per_round", "server_learning_rate", "learning_rate"),
    [
        ("table2-ni-1.3b", 40, 12, 36, 10, 1e-4),
        ("table2-ni-3b", 40, 12, 36, 10, 1e-4),
        ("table2-dolly-1.3b", 60, 20, 10, 3, 1e-4),
        ("table2-dolly-3b", 60, 20, 10, 3, 1e-4),
        ("code-alpaca-7b", 20, 20, 9, 5, 3e-4),
        ("code-alpaca-13b", 20, 20, 9, 10, 5e-4),
        ("gsm8k-7b", 20, 20, 3, 5, 3e-4),
        ("gsm8k-13b", 20, 20, 3, 10, 5e-4),
    ],
)
def test_the_papers_settings(
    name: str, others: int, ferret: int, per_round: int, server_learning_rate: float, learning_rate: float
) -> None:
    rows = {row.label: row.recipe for row in grid(name).rows}
    text, code = (rows.pop(label) for label in FERRET)
    assert {recipe.rounds for recipe in rows.values()} == {others}
    assert text.rounds == code.rounds == ferret
    assert {recipe.clients.per_round for recipe in (*rows.values(), text, code)} == {per_round}
    by_text, by_code = settings(text), settings(code)
    assert by_code["server_learning_rate"] == server_learning_rate
    # the code's scale is a third of the text's, so that these are the same step
    assert by_text["server_learning_rate"] == pytest.approx(server_learning_rate / 3, rel=0.002)
    for training in (by_text["training"], by_code["training"]):
        assert training["learning_rate"] == learning_rate
        assert training["steps"] * training["accumulate"] * training["batch_size"] == 40
    for label, recipe in rows.items():
        training = settings(recipe)["training"]
        assert training["steps"] == 200 if label in ("FedZO", "FedKSeed") else training["epochs"] == 1
        assert training["batch_size"] == 1


def settings(recipe: Any) -> dict[str, Any]:
    found: dict[str, Any] = recipe.tables()["algorithm"]
    return found


@pytest.mark.parametrize(("one", "other"), [("table2-ni", "1.3b 3b"), ("table2-dolly", "1.3b 3b")])
def test_two_sizes_of_a_table_differ_in_the_model_alone(one: str, other: str) -> None:
    first, second = (dict(read_tables(FOLDER / "paper" / f"{one}-{size}.toml")) for size in other.split())
    assert first.pop("model") != second.pop("model")
    assert first == second
