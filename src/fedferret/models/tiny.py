"""Models small enough for tests: one token per byte, made from a key in milliseconds, the same bits on every machine.

The causal one is a Llama of 90,624 parameters: two layers of width 64, four heads that share two key-value heads, tied
embeddings. The encoder is a BERT of two layers of width 64 with four heads and BERT's pooler, 120,704 parameters. A
text for the encoder begins with <bos>, in place of [CLS].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedferret.core.keys import Key
from fedferret.models.drawing import draw_transformer

if TYPE_CHECKING:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

_SPECIAL = ("<pad>", "<bos>", "<eos>")
_MAX_LENGTH = 2048
_ENCODER_MAX_LENGTH = 512
# A turn is <bos>role, a new line, the content, <eos>: like ChatML, in tokens of this vocabulary. Tools come before all
# turns, and calls of tools after the content, as JSON.
_CHAT_TEMPLATE = (
    "{% if tools %}{{ '<bos>tools\n' + (tools | tojson) + '<eos>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}{{ '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)


def tiny_config() -> LlamaConfig:
    """The configuration of the tiny model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=256 + len(_SPECIAL),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )


def tiny_model(key: Key) -> LlamaForCausalLM:
    """The tiny model with random weights from ``key``; norm weights are 1."""
    return random_llama(tiny_config(), key)


def random_llama(config: LlamaConfig, key: Key) -> LlamaForCausalLM:
    """A Llama with random weights; norm weights are 1.

    Args:
        config: its configuration.
        key: of the weights. The global generator does not advance.
    """
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):  # transformers initialises the weights too
        model = LlamaForCausalLM(config)
    draw_transformer(model, 0.02, key)
    return model


def tiny_encoder_config() -> BertConfig:
    """The configuration of the tiny encoder."""
    from transformers import BertConfig

    return BertConfig(
        architectures=["BertModel"],
        vocab_size=256 + len(_SPECIAL),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_ENCODER_MAX_LENGTH,
        pad_token_id=0,
        dtype="float32",
    )


def tiny_encoder(key: Key) -> BertModel:
    """The tiny encoder with random weights from ``key``; norm weights are 1, biases 0."""
    import torch
    from transformers import BertModel

    with torch.random.fork_rng(devices=[]):  # transformers initialises the weights too
        model = BertModel(tiny_encoder_config())
    draw_transformer(model, 1 / 8, key)  # 1/√64: with BERT's 0.02 signals vanish at this width, and SGD stands still
    return model


def tiny_encoder_tokenizer() -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer, which puts <bos> before a text and has no chat template."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B:1", special_tokens=[("<bos>", 1)]
    )
    tokenizer.model_max_length = _ENCODER_MAX_LENGTH
    tokenizer.chat_template = None
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, three special tokens (<pad> 0, <bos> 1, <eos> 2) and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        model_max_length=_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
