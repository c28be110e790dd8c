"""Models by name. Importing this package is cheap: torch and transformers are imported when a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedferret.models.catalogue import catalogue

if TYPE_CHECKING:
    from fedferret.models.loading import (
        LanguageModel,
        check,
        has_chat_template,
        is_local,
        load,
        parameter_shapes,
        save_folder,
        skeleton,
    )

__all__ = [
    "LanguageModel",
    "catalogue",
    "check",
    "has_chat_template",
    "is_local",
    "load",
    "parameter_shapes",
    "save_folder",
    "skeleton",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("fedferret.models.loading"), name)
