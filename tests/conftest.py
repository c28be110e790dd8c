"""Fixtures of every folder of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep a module's fast tests in one process, which makes the module's fixtures once."""
    if item.get_closest_marker("slow") is None and item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.location[0]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, the longest first: fast ones then fill the time in which slow ones wait."""
    items.sort(key=_seconds, reverse=True)


def _seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("slow")
    return -1.0 if marker is None else float(marker.kwargs.get("seconds", 0))


@pytest.fixture(scope="module")
def no_plots() -> Iterator[None]:
    """Runs and comparisons of this process write reports without plots: drawing is half of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedferret.tracking.plots.draw", lambda run: [])
        patch.setattr("fedferret.comparison.page.draw", lambda comparison: [])
        yield
