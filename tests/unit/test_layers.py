"""Imports point one way, importing costs little, and every module stands on its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedferret

ROOT = Path(fedferret.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pydantic", "numpy", "pandas", "peft")

# what each layer may import of the others, besides itself
MAY = {
    "core": set(),
    "wire": {"core"},
    "bases": {"core"},
    "local": {"core", "bases"},
    "models": {"core"},
    "data": {"core"},
    "algorithms": {"core", "bases", "local", "models"},
    "engines": {"core", "data", "tracking", "wire", "config", "experiment", "settings"},
    "evaluation": {"core", "local", "data"},
    "tracking": {"core", "wire", "data"},
    "sites": {"core", "data", "engines", "tracking", "config", "runner"},
    "comparison": {"core", "tracking", "config", "estimate", "experiment", "recipe_file", "runner"},
}


def layer(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def imported(module: str) -> Iterator[str]:
    """Every module that this one imports at run time, inside functions too; not those for type checkers alone."""
    waiting: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in whole)
        waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("module", [module for module in MODULES if layer(module) in MAY])
def test_imports_point_one_way(module: str) -> None:
    own = layer(module)
    for name in imported(module):
        if name.split(".")[0] == "fedferret" and name != "fedferret":
            assert layer(name) == own or layer(name) in MAY[own], f"{module} imports {name}"


@pytest.mark.parametrize("module", [module for module in MODULES if layer(module) == "core"])
def test_the_core_imports_torch_and_the_standard_library_alone(module: str) -> None:
    for name in imported(module):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top in ("torch", "fedferret"), f"{module} imports {name}"


def test_nothing_imports_the_command_line() -> None:
    for module in MODULES:
        assert module == "fedferret.cli" or "fedferret.cli" not in set(imported(module)), module


def test_every_folder_of_modules_is_a_layer_with_rules() -> None:
    assert {path.parent.name for path in MODULES.values() if path.parent != ROOT} == set(MAY)


@pytest.mark.parametrize(
    "module", ["fedferret", "fedferret.cli", "fedferret.algorithms.registry", "fedferret.data.registry"]
)
def test_importing_is_cheap(module: str) -> None:
    program = f"import {module}, sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    heavy = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert heavy == []


def test_every_module_imports_on_its_own_and_moves_no_global_state() -> None:
    program = (
        "import importlib, sys, torch, numpy\n"  # not Python's random: rich draws from it when imported
        "def state(): return torch.get_rng_state().tolist(), str(numpy.random.get_state()),"
        " torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()\n"
        "before = state()\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "assert state() == before\n"
    )
    subprocess.run([sys.executable, "-c", program, *MODULES], check=True)


@pytest.mark.parametrize("module", MODULES)
def test_no_global_generator_is_seeded(module: str) -> None:
    source = MODULES[module].read_text()
    if module == "fedferret.data.reasoning":
        return  # its generators read the global one, which is put back as it was; a test of its own sees to that
    for forbidden in ("manual_seed(", "random.seed(", "np.random.seed(", "seed_all("):
        assert forbidden not in source
    assert len(source.splitlines()) <= 400
