"""Answers that a model writes: greedy, in batches, the same as one at a time.

Prompts are padded on the left and sorted by length, so that little is padding; the mask and the positions that
transformers derives from it keep padding out of every sum. Answers end at the first stop token: the tokenizer's end
token, the checkpoint's, and the mark that ends a response in training.

A checkpoint's own generation settings (temperature, repetition penalty, forced tokens, ...) fill whatever a caller
leaves open, in transformers 5 even beside an explicit configuration. Here none of them holds.

Sums over a padded row may be rounded in another order, so two tokens whose logits agree to about 1e-6 could change
places in theory; see docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.data.examples import Example
from fedferret.data.templates import Template
from fedferret.local.response_loss import causal_model, learns_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stops: Collection[int],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> list[tuple[int, ...]]:
    """The new tokens of each prompt, its stop token left out. ``on_progress`` is called after each batch.

    ``model`` is a causal model of transformers, or peft's wrapper around one.
    """
    model.eval()
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    with _greedy(model, stops, max_new_tokens) as causal:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = _padded(model, [prompts[row] for row in rows])
            read = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # embeddings are not given back
            written = causal.generate(**inputs, generation_config=causal.generation_config)[:, read:].tolist()
            for row, new in zip(rows, written, strict=True):
                end = next((place for place, token in enumerate(new) if token in stops), len(new))
                answers[row] = tuple(new[:end])
            on_progress()
    return answers


def stop_tokens(
    model: Any, template: Template, tokenizer: PreTrainedTokenizerBase, example: Example, max_tokens: int
) -> frozenset[int]:
    """The tokens that end an answer; ``example`` is any with a short response, to see how training ends one."""
    ends = causal_model(model).generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    encoded = template.encode(example, tokenizer, max_tokens)
    if not encoded.response_cut and encoded.ids[-1] in tokenizer.all_special_ids:
        stops.add(encoded.ids[-1])
    return frozenset(stops - {None})


def prompt_room(model: Any, max_tokens: int, max_new_tokens: int) -> int:
    """How long a prompt may be: ``max_tokens``, if the model's positions leave room for the answer. UserError."""
    positions = getattr(causal_model(model).config, "max_position_embeddings", None) or max_tokens + max_new_tokens
    if positions <= max_new_tokens:
        raise UserError(f"max_new_tokens={max_new_tokens}: the model has {positions} positions in all, lower it")
    return min(max_tokens, positions - max_new_tokens)


@contextmanager
def _greedy(model: Any, stops: Collection[int], max_new_tokens: int) -> Iterator[Any]:
    """The causal model inside ``model``, generating by settings of ours alone."""
    from transformers import GenerationConfig

    ends = sorted(stops)
    causal = causal_model(model)
    inherited = causal.generation_config
    causal.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # follows an answer that has ended, and is cut off with its stop token
        use_cache=True,
    )
    try:
        yield causal
    finally:
        causal.generation_config = inherited


def _padded(model: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids (B, T), or embeddings (B, V + T, E) where V learned vectors come before each prompt, and the mask.

    Padding is on the left of both: peft would put it between the two, where it shifts the prompt's positions.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)]).to(device)
    if not learns_prompt(model):
        return {"input_ids": ids, "attention_mask": _mask(padding, longest, device)}
    embeddings_BTE = causal_model(model).get_input_embeddings()(ids)
    learned_VE = model.get_prompt(batch_size=1)[0].to(embeddings_BTE.dtype)
    rows = [
        torch.cat((row_TE[:left], learned_VE, row_TE[left:]))
        for left, row_TE in zip(padding, embeddings_BTE, strict=True)
    ]
    return {
        "inputs_embeds": torch.stack(rows),
        "attention_mask": _mask(padding, longest + len(learned_VE), device),
    }


def _mask(padding: Sequence[int], length: int, device: torch.device) -> Tensor:
    places_T = torch.arange(length, device=device)
    return (places_T >= torch.tensor(padding, device=device)[:, None]).long()
