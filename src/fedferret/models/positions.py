"""How many tokens a transformer reads at most, as far as its architecture says."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedferret.core.errors import UserError

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def position_limit(model: Any) -> int | None:
    """The most tokens of a row.

    Args:
        model: of transformers, on any device, the meta device included.

    Returns:
        The number of positions of the configuration, or of a table of positions that has fewer; None where neither
        sets a limit.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in _NAMES]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            # where RoBERTa numbers positions from behind its padding token
            limits.append(module.num_embeddings - (-1 if module.padding_idx is None else module.padding_idx) - 1)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def packed_limit(model: nn.Module) -> int | None:
    """The most tokens of a packed row, whatever positions its examples count.

    Args:
        model: of transformers, on any device, the meta device included.

    Returns:
        The width of the smallest square mask that the model keeps (GPT-Neo); None where it keeps none.
    """
    masks = (each for each in model.buffers() if each.ndim >= 2 and each.shape[-1] == each.shape[-2] > 1)
    return min((each.shape[-1] for each in masks), default=None)


def check_positions(name: str, model: nn.Module, max_tokens: int, taken: int) -> None:
    """Refuse texts that are longer than a model's positions.

    Args:
        name: the model's, for the error.
        model: of transformers, on any device, the meta device included.
        max_tokens: of a text.
        taken: positions of a learned prompt's vectors.

    Raises:
        UserError: says how many tokens a text may have.
    """
    limit = position_limit(model)
    if limit is not None and max_tokens + taken > limit:
        behind = f", {taken:,} of which a learned prompt takes" if taken else ""
        raise UserError(
            f'text.max_tokens={max_tokens}: model "{name}" has {limit:,} positions{behind}; set max_tokens to '
            f"at most {max(0, limit - taken):,}"
        )
