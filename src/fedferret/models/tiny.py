"""A Llama small enough for tests: 90,624 parameters, one token per byte, made from a key in milliseconds.

Two layers of width 64, four heads that share two key-value heads, tied embeddings. Each weight is a sum of twelve
uniform values (close to normal, standard deviation 0.02). The additions are exact and in a fixed order, so the weights
have the same bits on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedferret.core.keys import Key

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

_SPECIAL = ("<pad>", "<bos>", "<eos>")
_DEVIATION = 0.02
_MAX_LENGTH = 2048
# A turn is <bos>role, a new line, the content, <eos>: like ChatML, in tokens of this vocabulary.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\n' + message['content'] + '<eos>\n' }}{% endfor %}"
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            total = torch.full((parameter.numel(),), -6.0, dtype=torch.float64)
            for draw in range(12):
                total += key.fold(name, draw).uniform(parameter.numel())
            parameter.copy_((total * _DEVIATION).view_as(parameter))
    return model


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
