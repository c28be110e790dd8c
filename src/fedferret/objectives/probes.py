"""What is tried on a model once, before it is trained: a few short rows, read alone, in a batch and packed.

    alone      finite logits
    a batch    a row that ends in other tokens has the same logits before them: no token sees a later one
               a padded row has the logits that it has alone: no row sees another, or padding
    packed     each example of a row has the logits that it has alone: no example sees another, and positions begin anew

An architecture may break any of these and say nothing: state-space and recurrent layers, ALiBi, sinks and masks of its
own read a packed row as one text. Four forward passes of at most seventeen tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.text import plain_line, printable
from fedferret.data.batches import IGNORED, Batch, TokenisedData
from fedferret.data.templates import Tokens
from fedferret.models.adapters import prefix_of, transformer_of
from fedferret.objectives.interface import Loaded

_LENGTHS = (10, 7)
_CHANGED = 3  # tokens at the end of the first row
# Relative differences of fp32 logits: rounding gave 4e-7 in tiny models and 4e-6 in real ones of 30 layers; the mildest
# leak of 47 architectures, of an untrained LFM2, 5e-4. Refusing a packed row costs little, refusing a model much.
_ROUNDING = 1e-4
_ROUNDING_IN_A_BATCH = 1e-3
_COARSE = 0.1  # of weights in fewer bits

Scored = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


@torch.no_grad()
def check_language_model(name: str, model: nn.Module, scored: Scored, packed: bool) -> None:
    """Refuse a model that training would treat wrongly, by its architecture's name.

    Args:
        name: as in the recipe, for the message.
        model: a transformers causal model, with or without an adapter.
        scored: gives logits of shape (N, V) at the positions of a batch that have labels.
        packed: whether examples are packed into one row.

    Raises:
        UserError: the model fails, or is not causal, or mixes rows, or examples of a packed row.
    """
    kind = type(transformer_of(model)).__name__
    exact = all(type(each.data) is Tensor and each.dtype == torch.float32 for each in model.parameters())
    tolerance, packed_tolerance = (_ROUNDING_IN_A_BATCH, _ROUNDING) if exact else (_COARSE, _COARSE)
    rows = [_row(model, length, number) for number, length in enumerate(_LENGTHS)]
    changed = (*rows[0][:-_CHANGED], *_row(model, _CHANGED, len(rows)))

    def logits(batch: Batch) -> Tensor:
        found, targets = scored(model, batch)
        return found[targets != IGNORED]  # in bf16 there are more, up to a multiple of 16

    try:
        alone = [logits(_batch([row])) for row in rows]
        if not all(each.isfinite().all() for each in alone):
            raise UserError(f'model "{name}": {kind} gives logits that are NaN or infinite for a row of tokens')
        together = logits(_batch([changed, rows[1]]))
        left, right = together[: _LENGTHS[0] - 1], together[_LENGTHS[0] - 1 :]
        before = _LENGTHS[0] - _CHANGED
        if not agree(alone[0][:before], left[:before], tolerance) or not agree(alone[1], right, tolerance):
            whole, other = (logits(_batch([row]))[:before] for row in (rows[0], changed))
            if not agree(whole, other, tolerance):
                raise UserError(
                    f'model "{name}": {kind} lets a token see those after it, so it is not a causal language model'
                )
            raise UserError(f'model "{name}": {kind} reads a row otherwise in a batch than alone; it cannot be trained')
    except UserError:
        raise
    except Exception as error:  # whatever an architecture raises for inputs that it does not take
        reason = plain_line(f"{type(error).__name__}: {error}", 200)
        prompt = " behind a learned prompt" if prefix_of(model, 1) is not None else ""
        raise UserError(f'model "{name}": {kind} cannot read a row of tokens{prompt} ({reason})') from error
    if packed:
        try:
            separate = agree(torch.cat(alone[::-1]), logits(_batch(rows, packed=True)), packed_tolerance)
        except Exception:  # an architecture that does not take positions
            separate = False
        if not separate:
            raise UserError(
                f"text.packed=true: {kind} does not keep the examples of a packed row apart, so that each would be "
                f"learned as if it followed the one before; set packed=false"
            )


def check_tokens(loaded: Loaded, transformer: Any, largest: int) -> None:
    """Refuse data with a token that the model has no embedding for.

    Args:
        loaded: the model and its tokenizer.
        transformer: what has the embedding.
        largest: the largest number of a token in the data.

    Raises:
        UserError: names the token.
    """
    words = transformer.get_input_embeddings().weight.shape[0]
    if largest >= words:
        assert loaded.tokenizer is not None
        token = printable(str(loaded.tokenizer.convert_ids_to_tokens(largest)), 40)
        raise UserError(
            f'model "{loaded.name}": the data have the token "{token}" with number {largest:,}, and the embedding has '
            f"{words:,} rows; give the tokenizer that belongs to the model"
        )


def has_every_token(loaded: Loaded, transformer: Any) -> bool:
    """Compare a tokenizer with an embedding.

    Args:
        loaded: the model and its tokenizer.
        transformer: what has the embedding.

    Returns:
        Whether there is a row for every token; False where only the data can tell whether a token is missing.
    """
    assert loaded.tokenizer is not None
    return len(loaded.tokenizer) <= int(transformer.get_input_embeddings().weight.shape[0])


def agree(left: Tensor, right: Tensor, tolerance: float = _ROUNDING_IN_A_BATCH) -> bool:
    """Compare logits.

    Args:
        left: shape (..., V).
        right: of the same shape.
        tolerance: the largest relative difference that is rounding.

    Returns:
        Whether all rows of both are equal up to rounding.
    """
    left, right = left.float(), right.float()
    size = (left - left.mean(dim=-1, keepdim=True)).norm()
    return bool((left - right).norm() <= tolerance * size)


def _row(model: nn.Module, length: int, number: int) -> tuple[int, ...]:
    """Tokens drawn from all of the model's."""
    words = transformer_of(model).get_input_embeddings().weight.shape[0]
    drawn = Key.of(0, "probe", number).uniform(length) * words
    return tuple(drawn.long().clamp(0, words - 1).tolist())


def _batch(rows: list[tuple[int, ...]], packed: bool = False) -> Batch:
    """One batch of the rows, longest first, or packed with the shortest first; labels on all tokens but the first."""
    data = TokenisedData([Tokens(row, 1, False) for row in rows], packed, train_on_prompts=True)
    return next(data.batches(len(rows), Key.of(0, "probe") if packed else None))
