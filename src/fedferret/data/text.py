"""How examples become tokens: the ``[text]`` table of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedferret.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How examples become tokens."""

    template: str = "chat"  # "chat": the model's own; "alpaca": the paper's; else a template file
    max_tokens: int = 256  # longer prompts lose their beginning, and texts to classify their end
    packed: bool = False  # training batches end to end in one row, attention kept apart: no padding at all
    train_on: Literal["completions", "all"] = "completions"  # all: prompts too, to pre-train a model

    def __post_init__(self) -> None:
        if self.max_tokens < 8:
            raise UserError(f"max_tokens={self.max_tokens}: must be at least 8")
