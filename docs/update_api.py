"""Write docs/api.md from the docstrings of the public API, and check that each docstring is complete.

python docs/update_api.py            writes the page
python docs/update_api.py --check    lists incomplete docstrings; changes nothing
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"

CHAPTERS = {
    "Runs": ("api", "experiment", "core.errors"),
    "A method": (
        "core.algorithm",
        "core.task",
        "core.messages",
        "core.fields",
        "core.tree",
        "core.keys",
        "core.stages",
        "core.hand_over",
        "core.wire_cost",
    ),
    "A node and a round": (
        "core.node",
        "core.clients",
        "core.exchanges",
        "core.guard",
        "core.rounds",
        "core.weighting",
        "core.log",
    ),
    "Pools": ("core.pooling", "core.robust_pooling"),
    "Objectives and local training": (
        "objectives.next_token",
        "local.schedules",
        "local.steppers",
        "local.recomputing",
        "local.first_order",
        "local.zeroth_order",
    ),
    "Models and adapters": (
        "models.loading",
        "models.classifiers",
        "models.classifier_loading",
        "models.classifier_folder",
        "models.adapters.interface",
        "models.adapters.lora",
        "models.adapters.modules",
        "models.adapters.dense",
        "models.adapters.peft_folder",
        "models.adapters.start",
        "models.adapters.prompt",
    ),
    "Data": ("data.examples", "data.held_out", "data.batches", "data.labelled_batches", "data.registry"),
    "Bases": ("bases.basis", "bases.blocks", "bases.projector", "bases.quantise", "bases.coding", "bases.registry"),
    "The wire": ("wire.codec", "wire.ledger"),
    "Engines": ("engines.in_process", "engines.debug", "engines.transport"),
}
OPENING = """# Public API

`docs/update_api.py` writes this page from the docstrings. A test checks that the page is up to date, and that each
docstring names every argument, what is returned and what is raised. Methods that implement a documented method of a
base class are documented there. Settings of methods are in [recipes](recipes.md) and on the
[methods' pages](methods/ferret.md); [the design](design.md) explains how the parts fit, and has the legend of shape
suffixes such as `coordinates_K`.
"""
STYLE = {"returns_multiple_items": False, "returns_named_value": False, "warnings": False}  # of sections
SECTIONS = {"parameters": "Args", "returns": "Returns", "yields": "Yields", "raises": "Raises"}


def load() -> griffe.Module:
    """The package, parsed and not imported."""
    package = griffe.load("fedferret", search_paths=[str(ROOT / "src")], docstring_parser="google")
    assert isinstance(package, griffe.Module)
    return package


def members(scope: griffe.Object) -> Iterator[griffe.Class | griffe.Function]:
    """Public classes and functions that are written in ``scope``, constructors included, in its order."""
    for member in scope.members.values():
        public = not member.name.startswith("_") or is_written_constructor(member)
        if public and isinstance(member, griffe.Class | griffe.Function):  # an alias is neither: it is imported
            yield member


def is_written_constructor(member: griffe.Object | griffe.Alias) -> bool:
    """Whether a member is a constructor with arguments, and not a dataclass's."""
    if member.name != "__init__" or not isinstance(member, griffe.Function) or "dataclass" in member.parent.labels:
        return False
    return len(member.parameters) > 1


def is_documented_by_base(function: griffe.Function) -> bool:
    """Whether a base class of this package documents the method."""
    owner = function.parent
    if not isinstance(owner, griffe.Class) or function.name == "__init__":
        return False
    return any(
        isinstance(base.members.get(function.name), griffe.Function) and base.members[function.name].has_docstring
        for base in owner.mro()
    )


def problems(function: griffe.Function) -> list[str]:
    """What is missing in the docstring of a function."""
    if is_documented_by_base(function):
        return []
    if function.docstring is None:
        return ["has no docstring"]
    sections = function.docstring.parse("google", **STYLE)
    named = {item.name for section in sections if section.kind.value == "parameters" for item in section.value}
    kinds = {section.kind.value for section in sections}
    parameters = [item.name.lstrip("*") for item in function.parameters if item.name not in ("self", "cls")]
    found = [f"does not name {name} under Args" for name in parameters if name not in named]
    found += [f"names {name} under Args, which is no argument" for name in sorted(named - set(parameters))]
    if str(function.returns or "None") not in ("None", "NoReturn") and not kinds & {"returns", "yields"}:
        found.append("has no Returns")
    if raises(function) and "raises" not in kinds:
        found.append("has no Raises")
    return found


def raises(function: griffe.Function) -> bool:
    """Whether the body raises an exception, other than NotImplementedError."""
    tree = ast.parse("class _:\n" + function.source if function.source.startswith((" ", "\t")) else function.source)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return any("NotImplementedError" not in ast.unparse(node) for node in found)


def functions(package: griffe.Module) -> Iterator[griffe.Function]:
    """Every public function and method of the API's modules."""
    for names in CHAPTERS.values():
        for name in names:
            for member in members(module(package, name)):
                if isinstance(member, griffe.Function):
                    yield member
                else:
                    yield from (inner for inner in members(member) if isinstance(inner, griffe.Function))


def module(package: griffe.Module, name: str) -> griffe.Module:
    """A module of the package by its dotted name."""
    found = package[name]
    assert isinstance(found, griffe.Module)
    return found


def incomplete(package: griffe.Module) -> list[str]:
    """One line for each defect of a docstring."""
    return [f"{function.path}: {problem}" for function in functions(package) for problem in problems(function)]


def page(package: griffe.Module) -> str:
    """The page, as Markdown."""
    parts = [OPENING]
    for chapter, names in CHAPTERS.items():
        parts.append(f"## {chapter}\n")
        for name in names:
            parts.extend(module_lines(module(package, name)))
    return "\n".join(parts).rstrip() + "\n"


def module_lines(scope: griffe.Module) -> Iterator[str]:
    """The section of a module: the first line of its docstring and its classes and functions."""
    yield f"### `{scope.path}`\n"
    yield f"{opening(scope)}\n"
    for member in members(scope):
        if isinstance(member, griffe.Function):
            yield entry(member, 4)
            continue
        yield f"#### `{member.name}`\n"
        yield f"{text(member)}\n"
        if fields := [item for item in member.members.values() if is_field(item)]:
            yield "\n".join(field_line(member, item) for item in fields) + "\n"
        for inner in members(member):
            if isinstance(inner, griffe.Function) and not is_documented_by_base(inner):
                yield entry(inner, 5)


def is_field(item: griffe.Object | griffe.Alias) -> bool:
    """Whether a member is an annotated public attribute, and no property."""
    if not isinstance(item, griffe.Attribute) or item.name.startswith("_"):
        return False
    return item.annotation is not None and "property" not in item.labels


def field_line(owner: griffe.Class, item: griffe.Object | griffe.Alias) -> str:
    """A field with its type, its default and the comment that explains it."""
    assert isinstance(item, griffe.Attribute) and item.lineno is not None
    default = "" if item.value is None else f" = {item.value}"
    code, _, comment = owner.lines_collection[owner.filepath][item.lineno - 1].partition("  # ")
    return f"* `{item.name}: {item.annotation}{default}`" + (f": {comment}" if comment and code.strip() else "")


def entry(function: griffe.Function, depth: int) -> str:
    """A function's heading and docstring."""
    arguments = ", ".join(item.name for item in function.parameters if item.name not in ("self", "cls"))
    name = function.parent.name if function.name == "__init__" and function.parent else function.name
    return f"{'#' * depth} `{name}({arguments})`\n\n{text(function)}\n"


def opening(scope: griffe.Module) -> str:
    """The first paragraph of a module's docstring."""
    return "" if scope.docstring is None else scope.docstring.value.split("\n\n")[0]


def text(item: griffe.Object) -> str:
    """A docstring as Markdown: its words, then its sections as lists."""
    if item.docstring is None:
        return ""
    parts = []
    for section in item.docstring.parse("google", **STYLE):
        kind = section.kind.value
        if kind == "text":
            parts.append(section.value)
        elif kind == "examples":
            parts.append("\n\n".join(f"```python\n{value}\n```" for _, value in section.value))
        elif kind in SECTIONS:
            lines = [one(kind, value) for value in section.value]
            parts.append(f"{SECTIONS[kind]}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def one(kind: str, value: griffe.DocstringElement) -> str:
    """A line of a list of arguments, returned values or exceptions."""
    words = " ".join(value.description.split())
    if kind == "parameters":
        assert isinstance(value, griffe.DocstringParameter)
        return f"* `{value.name}`: {words}"
    if kind == "raises":
        return f"* `{value.annotation}`: {words}"
    return f"* {words}"


def main() -> None:
    package = load()
    if defects := incomplete(package):
        print("\n".join(defects), file=sys.stderr)
        sys.exit(f"{len(defects)} docstrings are incomplete")
    if "--check" not in sys.argv:
        PAGE.write_text(page(package), encoding="utf-8")


if __name__ == "__main__":
    main()
