"""Whatever a message declares of a field is so once it is decoded: for every message and state of the package."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedferret
from fedferret.core.exchanges import Masked, Train
from fedferret.core.fields import Form, declared_fields
from fedferret.core.messages import message, message_types
from fedferret.wire import codec
from fedferret.wire.codec import WireError

ROOT = Path(fedferret.__file__).parent
DECLARED = {
    path: re.findall(r"^@(?:message|state)\nclass (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    for path in sorted(ROOT.rglob("*.py"))
}
for path, names in DECLARED.items():
    if names:
        importlib.import_module(".".join(("fedferret", *path.relative_to(ROOT).with_suffix("").parts)))
TYPES = [each for each in message_types().values() if each.__module__.startswith("fedferret.")]
DTYPES = (torch.float32, torch.uint8, torch.int16, torch.int64)
EXEMPLARS: tuple[Any, ...] = (
    None, True, 7, 2.5, "x", b"x", (), (2.5,), {}, {"a": 1}, Train(1), Masked(None, 2),
    *(torch.zeros((2,) * rank, dtype=dtype) for dtype in DTYPES for rank in (0, 1, 2)),
)  # fmt: skip


@message
class Every:
    """A field of every kind that the package does not use."""

    pair: tuple[int, int]
    word: Literal["a", 2]
    maybe: int | None


def samples(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of the declared kind."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        dtypes, rank = arguments[1].dtype or DTYPES, arguments[1].rank
        shapes = st.lists(st.integers(0, 3), min_size=rank or 0, max_size=2 if rank is None else rank)
        dtype = st.sampled_from(dtypes if isinstance(dtypes, tuple) else (dtypes,))
        return st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, dtype)
    if annotation is Tensor:
        return samples(Annotated[Tensor, Form()])
    if origin in (Union, UnionType):
        return st.one_of(*map(samples, arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(samples(arguments[0]), min_size=1, max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(samples, arguments))
    if origin in (dict, Mapping, MutableMapping):
        return st.dictionaries(st.sampled_from("abc"), samples(arguments[1]), min_size=1)
    if dataclasses.is_dataclass(annotation):
        return st.builds(annotation, **{field.name: samples(field.annotation) for field in declared_fields(annotation)})
    plain = {
        int: st.integers(codec.LOWEST, codec.HIGHEST),
        float: st.floats(),
        bool: st.booleans(),
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        bytes: st.binary(max_size=5),
    }
    return st.just(None) if annotation in (NoneType, Any) else plain[annotation]


def label(value: Any) -> str:
    """What a value is, at its top."""
    return f"{value.dtype} {value.dim()}" if isinstance(value, Tensor) else type(value).__name__


def labels(annotation: Any) -> str:
    """A pattern of the labels that a declared kind has at its top."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return ".*"
    if annotation is Tensor:
        return r"torch\..*"
    if origin is Annotated:
        dtypes = arguments[1].dtype if isinstance(arguments[1].dtype, tuple) else (arguments[1].dtype or r"torch\.\w+",)
        rank = "[0-9]" if arguments[1].rank is None else arguments[1].rank
        return f"({'|'.join(map(str, dtypes))}) {rank}"
    if origin in (Union, UnionType):
        return "|".join(map(labels, arguments))
    if origin is Literal:
        return "never"
    return "dict" if origin in (Mapping, MutableMapping) else (origin or annotation).__name__


def wrong(annotation: Any, value: Any) -> list[Any]:
    """Values of another kind: at the top, then in one item."""
    others = [each for each in EXEMPLARS if not re.fullmatch(labels(annotation), label(each))]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        rest = value[1:]
        others += [(item, *rest) for item in wrong(arguments[0], value[0])]
        others += [(*value, *value), rest] if arguments[-1] is not Ellipsis else []
    if origin in (dict, Mapping, MutableMapping):
        name = next(iter(value))
        others += [{**value, name: item} for item in wrong(arguments[1], value[name])]
    return others


def test_every_message_of_the_package_is_here() -> None:
    declared = {name for names in DECLARED.values() for name in names}
    assert declared == {each.__name__ for each in TYPES} and len(declared) > 30


@pytest.mark.parametrize("cls", [*TYPES, Every], ids=lambda cls: cls.__name__)
def test_every_message_survives_and_every_field_of_another_kind_is_refused(cls: type) -> None:
    fields = declared_fields(cls)

    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    @given(samples(cls))
    def law(value: Any) -> None:
        encoded = codec.encode(value)
        assert codec.encode(codec.decode(encoded)) == encoded
        for field in fields:
            for other in wrong(field.annotation, getattr(value, field.name)):
                changed = codec.encode(dataclasses.replace(value, **{field.name: other}))
                with pytest.raises(WireError, match=rf"^{cls.__name__}\.{field.name} holds .*declared$") as caught:
                    codec.decode(changed)
                assert len(str(caught.value)) < 200

    law()


def test_a_field_of_no_kind_that_crosses_the_wire_is_named() -> None:
    @dataclasses.dataclass
    class Odd:
        numbers: set[int]

    with pytest.raises(TypeError, match=r"Odd declares a field that cannot be checked: set\[int\] is no kind"):
        declared_fields(Odd)
