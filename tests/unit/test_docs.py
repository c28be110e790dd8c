"""The pages say what the code does: every setting with its default, every dependency, every link, every example."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import fedferret
import fedferret.algorithms
import fedferret.objectives
from fedferret.algorithms import registry as methods
from fedferret.data import registry as sources
from fedferret.objectives import registry as objectives
from fedferret.tracking.report import write_report
from fedferret.tracking.summary import write_summary
from unit.written_run import write_run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
DEPENDENCIES = [*PROJECT["dependencies"], *(line for lines in OPTIONAL.values() for line in lines)]
MARKER = re.compile(r"<!-- settings: (\S+) -->\n((?:\|.*\n)+)")
COMMON = ["config.ModelSettings", "config.TextSettings", "config.ClientSettings", "config.EvaluationSettings"]
COMMON += ["config.ExecutionSettings", "local.first_order.FirstOrder", "data.partition.Partition"]
COMMON += ["core.robust_pooling.PoolSettings", "local.zeroth_order.ZerothOrder", "resident.site.Site"]
COMMON += ["resident.policy.Policy", "algorithms.server_optimizer.ServerOptimizer"]

Row = dict[str, str]


def settings_tables() -> dict[str, list[Row]]:
    """Every marked table of settings in the pages, by the dataclass it is of."""
    return {
        name: list(rows_of(table)) for page in PAGES for name, table in MARKER.findall(page.read_text(encoding="utf-8"))
    }


def rows_of(table: str) -> Iterator[Row]:
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    yield from (dict(zip(header, row, strict=True)) for row in rows)


def class_of(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def written(value: Any) -> str:
    """A value as the pages write it: TOML in backticks; words for what is not a value."""
    if value is None:
        return "`none`"
    if dataclasses.is_dataclass(value) or isinstance(value, dict):
        return "table"
    if isinstance(value, tuple):
        return f"`{json.dumps(value)}`" if len(value) <= 3 else f"{len(value)} names"
    return f"`{json.dumps(value)}`"


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return written(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else written(field.default)


@pytest.mark.parametrize("name", sorted(settings_tables()))
def test_a_page_names_every_setting_with_its_default_and_no_other(name: str) -> None:
    rows = settings_tables()[name]
    expected = {f"`{field.name}`": default_of(field) for field in dataclasses.fields(class_of(name))}
    assert {row["setting"]: row["default"] for row in rows} == expected
    assert len(rows) == len(expected)


def test_everything_that_has_settings_has_a_table() -> None:
    kinds = [methods.method(name) for name in methods.catalogue()] + [
        sources.source(name) for name in sources.catalogue()
    ]
    kinds += [kind for kind in map(objectives.objective, objectives.catalogue()) if dataclasses.fields(kind)]
    wanted = {f"{kind.__module__}.{kind.__name__}" for kind in kinds} | {f"fedferret.{name}" for name in COMMON}
    assert wanted == set(settings_tables())


@pytest.mark.parametrize("method", methods.catalogue())
def test_a_method_has_a_page_with_its_presets(method: str) -> None:
    kind = methods.method(method)
    assert (ROOT / "docs" / "methods" / f"{method}.md").exists()
    rows = settings_tables()[f"{kind.__module__}.{kind.__name__}"]
    for preset, values in kind.presets.items():
        assert {row["setting"]: row[preset] for row in rows if row[preset]} == {
            f"`{name}`": written(value) for name, value in values.items()
        }


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def requirements(lines: list[str]) -> set[str]:
    names = {Requirement(line).name.lower().replace("_", "-") for line in lines}
    return names - {"fedferret"}


def test_the_tests_that_the_page_on_security_names_exist() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(?:tests/)?(\w+/test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 25
    for module, test in named:
        path = ROOT / "tests" / module
        assert path.is_file() and f"def {test}" in path.read_text(), f"{module}::{test}"


def test_every_dependency_has_its_reason() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    always, extras, development = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert {row["package"] for row in rows_of(table_in(always))} == requirements(PROJECT["dependencies"])
    assert {(row["extra"], row["package"]) for row in rows_of(table_in(extras))} == {
        (extra, name) for extra, lines in OPTIONAL.items() if extra != "dev" for name in requirements(lines)
    }
    assert {row["package"] for row in rows_of(table_in(development))} == requirements(OPTIONAL["dev"])


def table_in(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


def test_every_import_is_a_declared_dependency() -> None:
    modules = {"tomli_w": "tomli-w", "sklearn": "scikit-learn"}
    declared = requirements(DEPENDENCIES)
    for path in ROOT.glob("src/**/*.py"):
        for name in re.findall(r"^\s*(?:from|import) (\w+)[\w.]*(?: import |$| as )", path.read_text(), re.MULTILINE):
            known = name in sys.stdlib_module_names or name == "fedferret"
            assert known or modules.get(name, name.replace("_", "-")) in declared, f"{path}: {name}"


def test_the_lock_pins_every_dependency() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") and "+" not in str(pin.specifier) for pin in pins)
    versions = {pin.name.lower().replace("_", "-"): str(pin.specifier)[2:] for pin in pins}
    for line in DEPENDENCIES:
        wanted = Requirement(line)
        name = wanted.name.lower().replace("_", "-")
        if name not in ("fedferret", "pip"):  # an environment brings its own pip
            assert versions[name] in wanted.specifier


def modules_with_examples() -> list[str]:
    paths = [path for path in ROOT.glob("src/fedferret/**/*.py") if ">>> " in path.read_text(encoding="utf-8")]
    return sorted(".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in paths)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0


def blocks(page: Path) -> dict[str, str]:
    """The fenced blocks of a page by the file that their first line names."""
    found = re.findall(
        r"^```(?:python|toml)\n# (\S+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return dict(found)


def test_the_method_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's file, registry line, limit test and recipe, taken from the page and used as it says."""
    guide = blocks(ROOT / "docs" / "adding-a-method.md")
    (tmp_path / "sign_vote.py").write_text(guide["src/fedferret/algorithms/sign_vote.py"])
    monkeypatch.setattr(fedferret.algorithms, "__path__", [*fedferret.algorithms.__path__, str(tmp_path)])
    ((name, entry),) = eval("{" + guide["src/fedferret/algorithms/registry.py"] + "}").items()
    monkeypatch.setitem(methods._METHODS, name, entry)

    limits: dict[str, Any] = {}
    exec(guide["tests/limits/test_sign_vote.py"], limits)
    tests = [value for name, value in limits.items() if name.startswith("test_")]
    for test in tests:
        test()
    assert tests

    (tmp_path / "recipe.toml").write_text(guide["recipes/sign_vote.toml"])
    summary = fedferret.run(fedferret.load_recipe(tmp_path / "recipe.toml"), out=tmp_path / "run")
    assert summary["eval_loss"][-1] < summary["eval_loss"][0]
    bits = 90_624 / 8
    assert bits < summary["bytes_up_per_client_round"] < bits + 1500  # names and sizes of 21 tensors


def test_the_objective_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's file, registry line, law and recipe, taken from the page and used as it says."""
    guide = blocks(ROOT / "docs" / "adding-an-objective.md")
    (tmp_path / "rating.py").write_text(guide["src/fedferret/objectives/rating.py"])
    monkeypatch.setattr(fedferret.objectives, "__path__", [*fedferret.objectives.__path__, str(tmp_path)])
    ((name, entry),) = eval("{" + guide["src/fedferret/objectives/registry.py"] + "}").items()
    monkeypatch.setitem(objectives._OBJECTIVES, name, entry)

    laws: dict[str, Any] = {}
    exec(guide["tests/unit/test_rating.py"], laws)
    laws["test_any_split_gives_the_same_figures"]()

    (tmp_path / "recipe.toml").write_text(guide["recipes/rating.toml"])
    summary = fedferret.run(fedferret.load_recipe(tmp_path / "recipe.toml"), out=tmp_path / "run")
    assert summary["eval_loss"][-1] < summary["eval_loss"][0]
    (figures,) = summary["metrics"].values()
    assert figures["worst-tenth"][-1] > figures["client-mean"][-1] > 0 < figures["absolute-error"][-1] < 4


def test_the_page_of_the_api_is_what_the_docstrings_say_and_no_docstring_is_incomplete() -> None:
    """Otherwise: complete them, and run docs/update_api.py."""
    update_api = importlib.import_module("docs.update_api")
    package = update_api.load()
    assert update_api.incomplete(package) == []
    assert update_api.PAGE.read_text(encoding="utf-8") == update_api.page(package)


@pytest.mark.parametrize(
    ("source", "defects"),
    [
        ('def f(a):\n    """Do."""\n', ["does not name a under Args"]),
        ('def f() -> int:\n    """Do."""\n', ["has no Returns"]),
        ('def f():\n    """Do."""\n    raise ValueError("no")\n', ["has no Raises"]),
        ('def f():\n    """Do.\n\n    Args:\n        a: a.\n    """\n', ["names a under Args, which is no argument"]),
        ("def f():\n    pass\n", ["has no docstring"]),
        ('def f(a) -> int:\n    """Do.\n\n    Args:\n        a: a.\n\n    Returns:\n        One.\n    """\n', []),
    ],
)  # fmt: skip
def test_an_incomplete_docstring_is_found(source: str, defects: list[str], tmp_path: Path) -> None:
    import griffe

    (tmp_path / "m.py").write_text(source)
    function = griffe.load("m", search_paths=[str(tmp_path)], docstring_parser="google")["f"]
    assert importlib.import_module("docs.update_api").problems(function) == defects


@pytest.mark.usefixtures("plots")
def test_the_readme_takes_its_figures_from_a_run(tmp_path: Path) -> None:
    update = importlib.import_module("docs.update_readme").update
    run, readme = tmp_path / "run", tmp_path / "README.md"
    readme.write_text("before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n")
    with pytest.raises(SystemExit, match="no finished run"):
        update(run, readme)
    run.mkdir()
    write_run(run)
    summary = write_summary(run)
    write_report(run)
    (run / "tuned.fedferret").write_bytes(bytes(1234))
    update(run, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- demo:begin -->\n") and text.endswith("\n<!-- demo:end -->\nafter\n")
    assert "old" not in text and "1.23 KB" in text
    assert f"{summary['eval_loss'][0]:.3f}" in text and f"{summary['eval_loss'][-1]:.3f}" in text
    assert "#fff" in (tmp_path / "docs" / "images" / "loss-by-round.svg").read_text()
    update(run, readme)
    assert readme.read_text() == text
