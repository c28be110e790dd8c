"""Wrong versions of any message, one value at a time; where, and how, is chosen by whoever drives it.

    mutated(payload, choose)     ``choose(n)`` gives a number from 0 to n - 1: hypothesis draws it in the suite,
                                 ``random.Random(seed).randrange`` or a coverage-guided fuzzer in a campaign

A mutation may be harmless: it is for the caller to say what must hold of what is accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedferret.core.exchanges import Train

Choose = Callable[[int], int]

INTEGERS = (0, -1, 1, 7, 2**31, 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e-45, 5e-324, 1e30, 3.4e38, -3.4e38, 1e300, float("inf"), -float("inf"), float("nan"))
TEXTS = ("", "a", "\x1b]0;title\x07", "line\nline", "\u202eright to left", "[red]", "x" * 5000)
DTYPES = (torch.float32, torch.float16, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    7,
    2.5,
    "x",
    b"x",
    (),
    (1, 2),
    {},
    {"a": 1.0},
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(3, dtype=torch.uint8),
    torch.zeros(2, 2),
    Train(1),
)


def mutated(value: Any, choose: Choose) -> Any:
    """``value`` with one part of it changed; a container is changed itself as often as any of its parts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        place = choose(len(names) + 1)
        if place == len(names):
            return _one_of(OTHERS, choose)
        return dataclasses.replace(value, **{names[place]: mutated(getattr(value, names[place]), choose)})
    if isinstance(value, dict):
        return _mutated_mapping(value, choose)
    if isinstance(value, tuple):
        return _mutated_tuple(value, choose)
    if choose(4) == 0:
        return _one_of(OTHERS, choose)
    if isinstance(value, Tensor):
        return _mutated_tensor(value, choose)
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return _one_of((*INTEGERS, value + 1, value - 1, value ^ 1 << choose(32), -value), choose)
    if isinstance(value, float):
        return _one_of((*FLOATS, -value, value * 1.5, value * 1e6), choose)
    return _one_of(TEXTS if isinstance(value, str) else tuple(text.encode() for text in TEXTS), choose)


def _one_of(values: tuple[Any, ...], choose: Choose) -> Any:
    return values[choose(len(values))]


def _mutated_mapping(value: dict[str, Any], choose: Choose) -> Any:
    names = list(value)
    place = choose(len(names) + 4)
    if place < len(names):
        return {**value, names[place]: mutated(value[names[place]], choose)}
    if place == len(names) or not names:
        return _one_of(OTHERS, choose)
    name = names[choose(len(names))]
    if place == len(names) + 1:
        return {other: item for other, item in value.items() if other != name}
    if place == len(names) + 2:
        return {**value, _one_of(TEXTS, choose): value[name]}
    return dict(reversed(value.items()))


def _mutated_tuple(value: tuple[Any, ...], choose: Choose) -> Any:
    place = choose(len(value) + 3)
    if place < len(value):
        return (*value[:place], mutated(value[place], choose), *value[place + 1 :])
    if place == len(value) or not value:
        return _one_of(OTHERS, choose)
    if place == len(value) + 1:
        return value[: choose(len(value))]
    return value + value[: 1 + choose(len(value))]


def _mutated_tensor(value: Tensor, choose: Choose) -> Tensor:
    flat = value.reshape(-1).clone()
    match choose(7):
        case 0:
            return value.to(_one_of(DTYPES, choose))
        case 1:
            return value.reshape(_one_of(((1, *value.shape), (*value.shape, 1), (-1,)), choose))
        case 2:
            return flat[: choose(flat.numel() + 1)]
        case 3:
            return torch.cat([flat, flat[: 1 + choose(3)]])
        case 4:
            return torch.zeros_like(value)
        case 5 if flat.numel():  # one element's bits; those of a float may become anything
            raw = flat.view(torch.uint8)
            raw[choose(raw.numel())] ^= 1 << choose(8)
        case _ if flat.numel():
            some = slice(None) if choose(2) else slice(0, 1)
            if flat.is_floating_point():
                flat[some] = torch.tensor(_one_of(FLOATS, choose), dtype=flat.dtype)
            else:
                limits = torch.iinfo(flat.dtype) if flat.dtype != torch.bool else None
                flat[some] = _one_of((limits.min, limits.max, 0, 1), choose) if limits else True
    return flat.reshape(value.shape)
