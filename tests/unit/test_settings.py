"""Settings: from TOML tables to dataclasses and back, strict about names and types."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from contract.methods import METHODS
from fedferret.algorithms.registry import catalogue, method
from fedferret.config import build_algorithm
from fedferret.core.errors import UserError
from fedferret.settings import build, table_of


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Nested settings."""

    rate: float = 0.5
    limit: int | None = 3

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise UserError(f"rate={self.rate}: must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A field of each kind."""

    name: str
    count: int = 1
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


FULL = {"name": "x", "count": 2, "on": True, "mode": "slow", "names": ["a", "b"], "inner": {"rate": 2, "limit": "none"}}


def test_a_table_becomes_settings_and_a_table_again() -> None:
    built = build(Outer, FULL, "outer")
    expected = Outer(name="x", count=2, on=True, mode="slow", names=("a", "b"), inner=Inner(rate=2.0, limit=None))
    assert built == expected
    assert build(Outer, table_of(built), "outer") == built
    assert table_of(built)["inner"]["limit"] == "none"


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.name in catalogue()])
def test_every_methods_settings_survive_a_table(name: str) -> None:
    assert build(method(METHODS[name].name), table_of(METHODS[name]), "algorithm") == METHODS[name]


@pytest.mark.parametrize("name", list(catalogue()))
def test_every_preset_is_valid_and_can_be_overridden(name: str) -> None:
    for preset in method(name).presets:
        plain = build_algorithm(name, {"preset": preset})
        training = "training" if hasattr(plain, "training") else "head"  # one is at the server
        changed = build_algorithm(name, {"preset": preset, training: {"steps": 3}})
        assert getattr(changed, training) == replace(getattr(plain, training), steps=3, epochs=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuont": 2}, r'outer\.cuont: there is no such setting; did you mean "count"\?'),
        ({"inner": {"rat": 1}}, r'outer\.inner\.rat: there is no such setting; did you mean "rate"\?'),
        ({"count": "2"}, r'outer\.count="2": input should be a valid integer'),
        ({"count": 2.5}, r"outer\.count=2\.5: input should be a valid integer"),
        ({"count": True}, r"outer\.count=true: input should be a valid integer"),
        ({"on": 1}, r"outer\.on=1: input should be a valid boolean"),
        ({"mode": "quick"}, r"outer\.mode=\"quick\": input should be 'fast' or 'slow'"),
        ({"names": ["a", 1]}, r"outer\.names\.1=1: input should be a valid string"),
        ({"name": None}, r"outer\.name"),
        ({"inner": {"rate": -1}}, r"outer\.inner: rate=-1\.0: must be greater than 0"),
        ({"inner": 3}, r"outer\.inner=3"),
        ({"inner": {"rate": float("inf")}}, r"outer\.inner\.rate=inf: must be a finite number"),
        ({"inner": {"rate": 1e39}}, r"outer\.inner\.rate=1e\+39: must be a finite number, at most 3.403e\+38"),
        ({"inner": {"rate": float("nan")}}, r"outer\.inner\.rate=nan: must be a finite number"),
        ({"inner": {"rate": 10**400}}, r"outer\.inner\.rate: a whole number must lie between"),
        ({"count": 2**63}, r"outer\.count: a whole number must lie between"),
        ({"names": ["a", -float("inf")]}, r"outer\.names\.1=-inf: must be a finite number"),
        ({"count": "none"}, r'outer\.count="none": input should be a valid integer'),
    ],
)
def test_an_invalid_setting_is_an_error_of_one_line_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        build(Outer, {**FULL, **change}, "outer")
    assert "\n" not in str(raised.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(UserError, match=r"outer\.name.*required"):
        build(Outer, {}, "outer")
