"""Configurations of tiny models, one of each architecture: hidden 32, two layers, 264 words, 64 positions."""

from __future__ import annotations

from typing import Any

VOCABULARY = 264
POSITIONS = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_GROUPED = {"num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "n_inner": 48}
_NO_HEADS = {"num_attention_heads": None, "intermediate_size": None, "max_position_embeddings": None}  # left out
_MAMBA = {**_NO_HEADS, "state_size": 8, "expand": 2, "conv_kernel": 4}
_TYPES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt-projected": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gpt_bigcode": {**_GPT2, "multi_query": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon-alibi": {"new_decoder_architecture": False, "multi_query": True, "alibi": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": POSITIONS},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {**_GROUPED, "head_dim": 8},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "head_dim": 8},
    "phi": {},
    "phi3": _GROUPED,
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "falcon_mamba": _MAMBA,
    "rwkv": {**_NO_HEADS, "attention_hidden_size": 32, "context_length": POSITIONS},
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "granite": {**_GROUPED, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "cohere": {**_GROUPED, "logit_scale": 0.5},
    "smollm3": _GROUPED,
    "deepseek_v3": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "persimmon": {},
    "glm4": {**_GROUPED, "head_dim": 8},
    "nemotron": {**_GROUPED, "head_dim": 8},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "attention_window_size": 8,
        "lru_width": 32,
        "head_dim": 8,
    },
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
    "bert-generation": {"is_decoder": True},
    "electra": {"is_decoder": True, "embedding_size": 16},
    "phimoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {
        **_GROUPED,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **_GROUPED,
        **_EXPERTS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
ARCHITECTURES = tuple(_TYPES)


def tiny_configuration(architecture: str) -> Any:
    """The configuration of a tiny model.

    Args:
        architecture: one of ``ARCHITECTURES``: a model type, with or without a variant after a hyphen.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = architecture if architecture in CONFIG_MAPPING else architecture.rpartition("-")[0]
    settings = {**_COMMON, **_TYPES[architecture]}
    return AutoConfig.for_model(kind, **{name: value for name, value in settings.items() if value is not None})


def tiny_instance(architecture: str) -> Any:
    """A random model of the architecture, with weights large enough that tokens matter; the same on every call."""
    import torch
    from transformers import AutoModelForCausalLM

    from fedferret.core.keys import Key

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)  # some weights below are added to what the architecture draws
        model = AutoModelForCausalLM.from_config(tiny_configuration(architecture))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = Key.of(4, "architecture", name).uniform(weight.numel()).view_as(weight) - 0.5
            if weight.ndim > 1 and "conv" not in name:
                weight.copy_(drawn * 0.5)
            else:
                weight.add_(drawn * 0.1)
    return model.eval()
