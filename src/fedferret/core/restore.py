"""Put a decoded public state where a task keeps its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedferret.core.task import Task


def restore_tensors(task: Task, public: Any) -> Any:
    """Put the tensors of a decoded public state where the task keeps them.

    Args:
        task: its ``store`` takes each mapping of tensors, onto its device or into its file.
        public: a state, or a part of one.

    Returns:
        A new state of the same form.
    """
    if isinstance(public, Mapping) and all(isinstance(value, Tensor) for value in public.values()):
        return task.store(public)
    if dataclasses.is_dataclass(public) and not isinstance(public, type):
        parts = {field.name: restore_tensors(task, getattr(public, field.name)) for field in dataclasses.fields(public)}
        return type(public)(**parts)
    return public
