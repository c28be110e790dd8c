"""Greedy generation in batches, with the same answers as one prompt at a time.

Prompts are sorted by length, which keeps padding short, and padded on the left. The mask, and the positions that
transformers derives from it, keep padding out of every sum. An answer ends at the first stop token: the tokenizer's end
token, the checkpoint's end tokens, or the token that ends a response in training.

In transformers 5 a checkpoint's ``generation_config`` (temperature, repetition penalty, forced tokens, ...) fills every
setting that the caller leaves open, even with an explicit configuration. Here none of those settings applies.

An architecture may read padding in spite of its mask (RWKV). It is asked once, and prompts of one length alone share a
batch there.

Sums over a padded row may be rounded in another order. In theory this can swap two tokens with logits that agree to
about 1e-6; see docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.data.examples import Example
from fedferret.data.templates import Template
from fedferret.models.adapters import prefix_of, transformer_of
from fedferret.models.positions import position_limit
from fedferret.objectives.probes import agree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IGNORES_PADDING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what ``_ignores_padding`` found


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stops: Collection[int],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> list[tuple[int, ...]]:
    """Generate an answer to each prompt.

    Args:
        model: a causal language model of transformers, or one that peft wraps.
        prompts: token ids, one sequence per prompt.
        stops: the tokens that end an answer.
        max_new_tokens: the longest answer.
        batch_size: prompts at a time.
        on_progress: is called after each ``batch_size`` prompts.
    Returns:
        The new tokens of each prompt, in the order of the prompts, the stop token left out.
    """
    model.eval()
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    done = 0
    padded = len(set(lengths)) > 1 and batch_size > 1 and _ignores_padding(model)
    with _greedy(model, stops, max_new_tokens) as causal:
        for rows in _groups(lengths, batch_size, padded):
            inputs = _padded(model, [prompts[row] for row in rows])
            read = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # generate does not return embeddings
            written = causal.generate(**inputs, generation_config=causal.generation_config)[:, read:].tolist()
            for row, new in zip(rows, written, strict=True):
                end = next((position for position, token in enumerate(new) if token in stops), len(new))
                answers[row] = tuple(new[:end])
            for _ in range(-(-(done + len(rows)) // batch_size) - -(-done // batch_size)):
                on_progress()
            done += len(rows)
    return answers


def _groups(lengths: Sequence[int], size: int, padded: bool) -> Iterator[list[int]]:
    """The prompts of each batch, longest first; unless ``padded``, of one length."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    parts = [order] if padded else [list(rows) for _, rows in groupby(order, key=lambda row: lengths[row])]
    for part in parts:
        for start in range(0, len(part), size):
            yield part[start : start + size]


def _ignores_padding(model: nn.Module) -> bool:
    """Whether a short prompt beside a longer one has the logits that it has alone, for the first two tokens."""
    causal = transformer_of(model)
    if causal not in _IGNORES_PADDING:
        with _greedy(model, (), 2) as ready:
            settings = ready.generation_config
            settings.output_logits, settings.return_dict_in_generate = True, True

            def logits(prompts: Sequence[Sequence[int]]) -> Tensor:
                written = ready.generate(**_padded(model, prompts), generation_config=settings)
                return torch.stack([step[-1] for step in written.logits])

            _IGNORES_PADDING[causal] = agree(logits([(1, 2, 3)]), logits([(4, 5, 6, 7, 8, 3, 2), (1, 2, 3)]))
    return _IGNORES_PADDING[causal]


def stop_tokens(
    model: Any, template: Template, tokenizer: PreTrainedTokenizerBase, example: Example, max_tokens: int
) -> frozenset[int]:
    """The tokens that end an answer.

    Args:
        model: a causal language model of transformers, or one that peft wraps.
        template: encodes the example.
        tokenizer: the model's.
        example: any example with a short response; its last token shows how training ends a response.
        max_tokens: the longest example, in tokens.

    Returns:
        Token ids: the model's ends of text, and the template's end of a response.
    """
    ends = transformer_of(model).generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    encoded = template.encode(example, tokenizer, max_tokens)
    if not encoded.response_cut and encoded.ids[-1] in tokenizer.all_special_ids:
        stops.add(encoded.ids[-1])
    return frozenset(stops - {None})


def prompt_room(model: Any, max_tokens: int, max_new_tokens: int) -> int:
    """The longest prompt in tokens: ``max_tokens``, or less where the answer would exceed the model's positions.

    Args:
        model: a causal language model of transformers, or one that peft wraps.
        max_tokens: the longest prompt that the recipe allows.
        max_new_tokens: the longest answer.

    Returns:
        Tokens, at least 1.

    Raises:
        UserError: if the answer alone fills the model's positions.
    """
    positions = position_limit(transformer_of(model)) or max_tokens + max_new_tokens
    prefix = prefix_of(model, 1)
    positions -= 0 if prefix is None else prefix.shape[1]
    if positions <= max_new_tokens:
        raise UserError(
            f"evaluation.max_new_tokens={max_new_tokens}: must be less than the model's {positions} positions"
        )
    return min(max_tokens, positions - max_new_tokens)


@contextmanager
def _greedy(model: Any, stops: Collection[int], max_new_tokens: int) -> Iterator[Any]:
    """The causal model inside ``model``, with generation settings for greedy decoding and no others."""
    from transformers import GenerationConfig

    ends = sorted(stops)
    causal = transformer_of(model)
    inherited = causal.generation_config
    causal.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # fills the row after a stop token, and is cut off
        use_cache=True,
    )
    try:
        yield causal
    finally:
        causal.generation_config = inherited


def _padded(model: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids (B, T), or embeddings (B, V + T, E) where V learned vectors come before each prompt, and the mask.

    Padding is on the left of both. peft puts it between the vectors and the prompt, where it shifts the positions.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)]).to(device)
    prefix_BVE = prefix_of(model, 1)
    if prefix_BVE is None:
        return {"input_ids": ids, "attention_mask": _mask(padding, longest, device)}
    embeddings_BTE = transformer_of(model).get_input_embeddings()(ids)
    learned_VE = prefix_BVE[0].to(embeddings_BTE.dtype)
    rows = [
        torch.cat((row_TE[:left], learned_VE, row_TE[left:]))
        for left, row_TE in zip(padding, embeddings_BTE, strict=True)
    ]
    return {
        "inputs_embeds": torch.stack(rows),
        "attention_mask": _mask(padding, longest + len(learned_VE), device),
    }


def _mask(padding: Sequence[int], length: int, device: torch.device) -> Tensor:
    """An attention mask (B, T): 0 for the padding on the left, else 1."""
    positions_T = torch.arange(length, device=device)
    return (positions_T >= torch.tensor(padding, device=device)[:, None]).long()
