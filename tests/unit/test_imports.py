"""Imports without a search for garbage: what is frozen, and what is not."""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedferret.core.imports import quick_imports


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_nothing_is_collected_while_modules_load_and_they_are_frozen_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loaded_for_this_test.py").write_text("values = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with quick_imports():
        assert not gc.isenabled()
        importlib.import_module("loaded_for_this_test")
    assert gc.isenabled() and gc.get_freeze_count() > 1000


def test_a_block_that_imports_nothing_freezes_nothing() -> None:
    """It runs in long processes too, where garbage may be waiting."""
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_advice_to_install_another_package_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes gives it on processors with AVX512-BF16, at the start of every run with an adapter."""
    adviser = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with quick_imports():
        adviser.warning("make sure you installed kernels")
    adviser.warning("what comes later")
    assert caplog.messages == ["what comes later"]


def test_where_the_collector_was_off_it_stays_off() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
