"""The registry: every source by name, a light import, a suggestion for a misspelt name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from fedferret.core.errors import UserError
from fedferret.data.registry import catalogue, source


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_source_is_a_frozen_dataclass_that_loads(name):
    settings = source(name)
    assert dataclasses.is_dataclass(settings) and settings.__dataclass_params__.frozen
    assert callable(settings.load)
    assert catalogue()[name] and "\n" not in catalogue()[name]


def test_an_error_on_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match='did you mean "chitchat"'):
        source("chitchatt")


def test_the_catalogue_imports_nothing_heavy():
    heavy = {"torch", "datasets", "pandas", "transformers", "numpy", "reasoning_gym"}
    code = f"import sys, fedferret.data.registry as r; r.catalogue(); print(*({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
