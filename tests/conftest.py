"""Fixtures of every folder of tests."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

import pytest

from fedferret.core.imports import quick_imports


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the tests, and what they import, faster: each process of a run does."""
    with quick_imports():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules of slow tests, the longest first: fast ones fill the time in which slow ones wait."""
    items.sort(key=_seconds, reverse=True)


def _seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("slow")
    if marker is None:
        return -1.0
    assert not marker.args, f"{item.nodeid}: write slow(seconds={marker.args[0]}), for its place in the order"
    return float(marker.kwargs.get("seconds", 0))


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[pytest.MonkeyPatch]:
    """Runs and comparisons of this process write reports without plots: drawing is half of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        if "fedferret.runner" in sys.modules:  # otherwise nothing is run, and matplotlib takes a second to import
            _draw_nothing(patch)
        yield patch


@pytest.fixture
def plots(no_plots: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that look at plots: they are drawn."""
    no_plots.undo()
    yield
    _draw_nothing(no_plots)


def _draw_nothing(patch: pytest.MonkeyPatch) -> None:
    for name in ("fedferret.tracking.plots.draw", "fedferret.comparison.page.draw"):
        patch.setattr(name, lambda shown: [])
