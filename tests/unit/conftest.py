"""Fixtures of several modules."""

from __future__ import annotations

import pytest


@pytest.fixture
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's numbers, which Flower's messages are written in the name of."""
    from flwr.supercore.task_identity import TaskIdentity  # an extra: not every installation has it

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
