"""Every method's payload, mutated field by field: refused with one line, or nothing that could do harm is in it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.core.exchanges import Failure
from fuzz.payloads import Attacked, rows

pytestmark = pytest.mark.slow(seconds=21)

EXAMPLES = 200


@pytest.mark.parametrize("name", rows())
def test_a_mutated_payload_is_one_failure_or_within_cost_kinds_and_bounds(name: str) -> None:
    attacked, refused = Attacked(name), 0

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**64 - 1))  # one draw: a draw for every choice takes longer than all the rest
    def law(seed: int) -> None:
        nonlocal refused
        refused += isinstance(attacked.example(random.Random(seed).randrange), Failure)

    law()
    assert EXAMPLES / 4 < refused < EXAMPLES  # most mutations are wrong, and some are harmless
