"""Fixtures of every folder of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def no_plots() -> Iterator[None]:
    """Runs and comparisons of this process write reports without plots: drawing is half of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedferret.tracking.plots.draw", lambda run: [])
        patch.setattr("fedferret.comparison.page.draw", lambda comparison: [])
        yield
