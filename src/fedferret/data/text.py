"""How examples become tokens: the ``[text]`` table of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import Literal, TypeAlias

from fedferret.core.errors import UserError

Cut: TypeAlias = Literal["response", "prompt"]
TrainOn: TypeAlias = Literal["completions", "all"]


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How examples become tokens."""

    template: str = "chat"  # "chat": the model's own; "alpaca": the paper's; else a template file
    max_tokens: int = 256  # texts to classify lose their end; for prompts and responses see ``cut``
    cut: Cut = (
        "response"  # its end, where the prompt has a quarter of max_tokens; "prompt": its beginning, up to a token
    )
    date: str | None = None  # "2026-11-28": today, to chat templates that write the date
    packed: bool = False  # training batches end to end in one row, attention kept apart: no padding at all
    train_on: TrainOn = "completions"  # all: prompts too, to pre-train a model; never turns of weight 0

    def __post_init__(self) -> None:
        if self.max_tokens < 8:
            raise UserError(f"max_tokens={self.max_tokens}: must be at least 8")
        if self.date is not None and not _is_date(self.date):
            raise UserError(f'date="{self.date}": give a day such as "2026-11-28"')


def _is_date(text: str) -> bool:
    try:
        return bool(re.fullmatch(r"\d{4}-\d\d-\d\d", text) and date.fromisoformat(text))
    except ValueError:
        return False
