"""A random Llama of 3.2 million weights that learns English in minutes: the model for comparisons of many methods.

Six layers of width 192, six heads that share three key-value heads, tied embeddings. Its vocabulary is the first 4,096
entries of SmolLM2's. A byte-pair vocabulary is sorted by rank, so its first entries are a complete tokenizer; they
include ChatML's special tokens. The weights are random until `recipes/small/pretrain.toml` trains them to chat.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedferret.core.keys import Key
from fedferret.models.packaged import ensure
from fedferret.models.tiny import random_llama

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

_VOCABULARY = 4096
DONOR = "packaged:smollm2"
# ChatML without SmolLM2's default system message, which would fill a fifth of a short example
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def small_config() -> LlamaConfig:
    """The configuration of the small model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )


def small_model(key: Key) -> LlamaForCausalLM:
    """The small model with random weights from ``key``; norm weights are 1."""
    return random_llama(small_config(), key)


def small_tokenizer(log: Callable[[str], None]) -> PreTrainedTokenizerBase:
    """The first 4,096 entries of SmolLM2's tokenizer, with ChatML; SmolLM2 is fetched unless it is cached.

    Args:
        log: is called with a line before each step that takes seconds.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = ensure(DONOR, log)
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = written["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < _VOCABULARY}
    # a merge into a token that was left out is never made
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(written)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
