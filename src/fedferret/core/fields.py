"""What a field of a message may hold: the field's annotation, made into a check once per class.

    bool int float str bytes None     exactly that type: a bool is no int, and an int is no float
    Tensor                            any; Annotated[Tensor, Form(torch.uint8, rank=1)] has that data type and rank
    tuple[X, ...]   tuple[X, Y]       any number of X; exactly an X and a Y
    dict[str, X]   Tree               values of X by name
    X | Y   Literal[...]              one of these
    a message or a state              exactly that class; its fields were checked when it was decoded
    Any                               whatever crosses the wire

The codec checks every message and state that it decodes, so a method's ``accept`` checks settings and ranges alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Fits: TypeAlias = Callable[[Any], bool]

_PLAIN = (bool, int, float, str, bytes, NoneType)
_MAPPINGS = (dict, Mapping, MutableMapping)


@dataclass(frozen=True)
class Form:
    """The form of a tensor field, as ``Annotated[Tensor, Form(...)]``.

    Attributes:
        dtype: of the elements, or those allowed; None: any.
        rank: number of dimensions; None: any.
    """

    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    rank: int | None = None

    def fits(self, value: Any) -> bool:
        """Check a value.

        Args:
            value: anything.

        Returns:
            Whether ``value`` is a tensor of this form.
        """
        if not isinstance(value, Tensor) or self.rank not in (None, value.dim()):
            return False
        return self.dtype is None or value.dtype in (self.dtype if isinstance(self.dtype, tuple) else (self.dtype,))


@dataclass(frozen=True)
class Field:
    """A declared field.

    Attributes:
        name: of the field.
        declared: the annotation, as written.
        annotation: the annotation, resolved.
        fits: whether a value is of the declared kind.
    """

    name: str
    declared: str
    annotation: Any
    fits: Fits


@cache
def declared_fields(declaring: type) -> tuple[Field, ...]:
    """Resolve a class's annotations; only the first call for a class takes time.

    Args:
        declaring: a dataclass.

    Returns:
        The fields in order of declaration.

    Raises:
        TypeError: an annotation names something unknown or is of no kind that can be checked.
    """
    try:
        hints = get_type_hints(declaring, include_extras=True)
        return tuple(
            Field(field.name, str(field.type), hints[field.name], _check_of(hints[field.name]))
            for field in dataclasses.fields(declaring)
        )
    except (NameError, TypeError) as error:
        raise TypeError(f"{declaring.__name__} declares a field that cannot be checked: {error}") from None


def misfit(declaring: type, values: Sequence[Any]) -> str | None:
    """Find a value that is not of the kind that its field declares.

    Args:
        declaring: a dataclass.
        values: of its fields, in order of declaration.

    Returns:
        What is wrong, on one line; None where every value fits.
    """
    for field, value in zip(declared_fields(declaring), values, strict=True):
        if not field.fits(value):
            return f"{declaring.__name__}.{field.name} holds {kind_of(value)}, and {field.declared} is declared"
    return None


def kind_of(value: Any) -> str:
    """Describe a value without its content.

    Args:
        value: anything.

    Returns:
        Its type; of a tensor the data type and the rank too, of a tuple or a mapping the length.
    """
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} and rank {value.dim()}"
    if isinstance(value, tuple | dict):
        return f"a {type(value).__name__} of {len(value):,}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _check_of(annotation: Any) -> Fits:
    if annotation is Any:
        return lambda value: True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        form = next((each for each in arguments[1:] if isinstance(each, Form)), None)
        return _check_of(arguments[0]) if form is None else form.fits
    if origin in (Union, UnionType):
        checks = [_check_of(each) for each in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is Literal:
        return lambda value: any(type(value) is type(each) and value == each for each in arguments)
    if origin is tuple:
        return _check_of_tuple(arguments)
    if origin in _MAPPINGS and arguments[0] is str:
        item = _check_of(arguments[1])
        return lambda value: type(value) is dict and all(map(item, value.values()))
    if annotation is Tensor:
        return lambda value: isinstance(value, Tensor)
    if annotation in _PLAIN or dataclasses.is_dataclass(annotation):
        return lambda value: type(value) is annotation
    raise TypeError(f"{annotation} is no kind of value that crosses the wire")


def _check_of_tuple(arguments: tuple[Any, ...]) -> Fits:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        item = _check_of(arguments[0])
        return lambda value: type(value) is tuple and all(map(item, value))
    checks = [_check_of(each) for each in arguments]
    return lambda value: (
        type(value) is tuple
        and len(value) == len(checks)
        and all(check(each) for check, each in zip(checks, value, strict=True))
    )
