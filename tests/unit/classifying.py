"""What the tests of classifiers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fedferret.models as models
from fedferret.core.errors import UserError

SHORT, LONG = "a text", "a text that is longer"


def tokens(loaded: models.LoadedClassifier, *texts: str) -> Any:
    """A batch of texts, padded."""
    assert loaded.tokenizer is not None
    return loaded.tokenizer(list(texts), padding=True, return_tensors="pt")


def logits(loaded: models.LoadedClassifier, batch: Any) -> torch.Tensor:
    """The logits of a batch, without a gradient."""
    with torch.no_grad():
        return loaded.model(batch)


def one_line(action: Callable[[], object]) -> str:
    """The error of a user's mistake."""
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)
