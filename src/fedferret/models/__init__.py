"""Models by name. Importing this package is cheap: torch and transformers are imported when a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedferret.models.catalogue import catalogue

if TYPE_CHECKING:
    from fedferret.models.classifier_folder import save_classifier
    from fedferret.models.classifier_loading import (
        LoadedClassifier,
        check_classifier,
        classifier,
        classifier_skeleton,
        own_pooling,
    )
    from fedferret.models.classifiers import Classifier, ImageClassifier, TextClassifier
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
    "Classifier",
    "ImageClassifier",
    "LanguageModel",
    "LoadedClassifier",
    "TextClassifier",
    "catalogue",
    "check",
    "check_classifier",
    "classifier",
    "classifier_skeleton",
    "has_chat_template",
    "is_local",
    "load",
    "own_pooling",
    "parameter_shapes",
    "save_classifier",
    "save_folder",
    "skeleton",
]


_HOMES = {
    "Classifier": "classifiers",
    "ImageClassifier": "classifiers",
    "TextClassifier": "classifiers",
    "LoadedClassifier": "classifier_loading",
    "check_classifier": "classifier_loading",
    "own_pooling": "classifier_loading",
    "classifier": "classifier_loading",
    "classifier_skeleton": "classifier_loading",
    "save_classifier": "classifier_folder",
}  # all others: loading


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"fedferret.models.{_HOMES.get(name, 'loading')}"), name)
