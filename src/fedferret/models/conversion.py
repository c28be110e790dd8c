"""From a GGUF file to a Hugging Face folder: weights, configuration, tokenizer.

The weights are streamed: each tensor is de-quantised slab by slab into the file. So the tokenizer sets the peak memory,
and the file's digest depends on the GGUF file alone. The digest is the base's fingerprint, the same on every machine.

Two layouts differ from those of transformers. llama.cpp interleaves the two rotary halves of Llama's query and key
rows, and stores Gemma's norm weights with their 1 added. Both are undone here, exactly.

Deviation from transformers' converter: it loses SmolLM2's rule that each digit is a separate token, and Gemma's
user-defined tokens (runs of spaces, tabs and newlines; tags). The tokenizers built here keep both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedferret.models.gguf import GgufFile, QuantisedTensor, read_gguf
from fedferret.models.safetensors_file import StreamedTensor, write_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # token types of a GGUF vocabulary

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FFN_NORM = {"llama": "post_attention_layernorm", "gemma3": "pre_feedforward_layernorm"}


def convert(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Write the model in a GGUF file as a Hugging Face folder.

    Args:
        source: the GGUF file.
        folder: an existing folder to write into.
        config: the content of ``config.json``.
    """
    gguf = read_gguf(source)
    write_weights(gguf, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    identifiers = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(identifiers, indent=2) + "\n")
    write_tokenizer(gguf, folder, config["max_position_embeddings"])


def write_weights(gguf: GgufFile, path: Path) -> None:
    """Stream every tensor as fp32 into a safetensors file, in the order of the tensors' names.

    Args:
        gguf: the file to read from.
        path: the safetensors file to write.
    """
    architecture = gguf.metadata["general.architecture"]
    tensors = {
        _name(name, architecture): StreamedTensor(tensor.shape, partial(_slabs, gguf, name, tensor))
        for name, tensor in gguf.tensors.items()
    }
    write_tensors(path, tensors)


def write_tokenizer(gguf: GgufFile, folder: Path, max_length: int) -> None:
    """Build the fast tokenizer that the vocabulary of a GGUF file describes, and save it.

    Args:
        gguf: the file to read from.
        folder: the folder to save the tokenizer in.
        max_length: the tokenizer's ``model_max_length``, in tokens.
    """
    from transformers import PreTrainedTokenizerFast

    settings = {key.removeprefix("tokenizer.ggml."): value for key, value in gguf.metadata.items()}
    tokens = settings["tokens"]
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {name: tokens[settings[f"{key}_token_id"]] for key, name in names.items()}
    build = {"gpt2": _byte_level, "llama": _sentence_piece}[settings["model"]]
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=build(settings),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=settings.get("tokenizer.chat_template"),
        **special,
    )
    tokenizer.save_pretrained(folder)


def _name(name: str, architecture: str) -> str:
    """The name in transformers of the tensor that llama.cpp calls ``name``."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    _, layer, part = stem.split(".")
    inner = _FFN_NORM[architecture] if part == "ffn_norm" else _LAYER[part]
    return f"model.layers.{layer}.{inner}.weight"


def _slabs(gguf: GgufFile, name: str, tensor: QuantisedTensor) -> Iterator[NDArray[np.float32]]:
    """The fp32 elements of a tensor in transformers' layout, a slab of rows at a time."""
    architecture = gguf.metadata["general.architecture"]
    if architecture == "llama" and (match := re.search(r"attn_([qk])\.weight$", name)):
        heads = gguf.metadata["llama.attention.head_count" + ("_kv" if match[1] == "k" else "")]
        interleaved = np.arange(tensor.shape[0]).reshape(heads, -1, 2)
        yield from tensor.rows(interleaved.swapaxes(1, 2).ravel())
    elif architecture == "gemma3" and name.endswith("norm.weight"):
        yield from (slab - np.float32(1) for slab in tensor.rows())
    else:
        yield from tensor.rows()


def _byte_level(settings: Mapping[str, Any]) -> Tokenizer:
    """SmolLM2's kind: byte-level BPE where each digit is a separate token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = settings["tokens"]
    merges = [(left, right) for left, right in (line.split(" ") for line in settings["merges"])]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, settings["token_type"], strict=True)
            if kind == _CONTROL
        ]
    )
    return tokenizer


def _sentence_piece(settings: Mapping[str, Any]) -> Tokenizer:
    """Gemma's kind: BPE over characters, spaces as "▁", bytes for unknown characters; a text begins with <bos>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, kinds = settings["tokens"], settings["token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    plain = [index for index, kind in enumerate(kinds) if kind == 1]
    plain.sort(key=lambda index: -settings["scores"][index])
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [pair for index in plain for pair in _splits(tokens[index], vocabulary)],
            unk_token=tokens[settings["unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = tokens[settings["bos_token_id"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, vocabulary[bos])]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _splits(piece: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of known tokens that merge into ``piece``, the longest left part first."""
    cuts = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
