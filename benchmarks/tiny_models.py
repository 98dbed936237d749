"""Tiny random models of every causal LM type that the installed transformers knows, made from its configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
MAX_TOKENS = 64
MOST_LAYERS = 4  # of a model whose layers are of several kinds: one of each kind, up to so many

# What a configuration calls its sizes. Only those that it has are set.
SIZES: dict[str, int | float] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("backbone_hidden_size", "attention_hidden_size", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("dim_ff", "dff", "d_inner", "feed_forward_size", "intermediate_size_mlp", "block_ffn_dim"), 48),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "swa_head_dim", "d_kv", "d_head", "dim_head"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_head_size", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim", "index_topk"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads", "mamba_num_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "num_linear_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "model_max_length", "max_seq_len", "n_ctx"), MAX_TOKENS),
    **dict.fromkeys(("context_length", "max_target_positions", "max_source_positions"), MAX_TOKENS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    "is_decoder": True,  # BERT and its like are causal by it
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "rope_scaling": None,
}

# What the sizes above do not say of a type. A dictionary is of a part of the configuration.
_LATENT = {"num_key_value_heads": 4}  # latent attention has a key and a value for every head
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_BY_KIND = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_BYTES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
_BLT_PART = _BYTES | {"hidden_size_global": 32, "num_hidden_layers": 2}
_DOTS_HEADS = {"swa_num_key_value_heads": 4, "swa_num_attention_heads": 4}
_QSA = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
_WIDE_HEADS = {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}
TWEAKS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu"), _LATENT),
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blt": {
        "patcher_config": _BYTES,
        "encoder_config": _BLT_PART,
        "decoder_config": _BLT_PART,
        "global_config": _BYTES | {"num_hidden_layers": 2},
        "encoder_hash_byte_group_vocab": 50,
    },
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _BY_KIND, "full_attention": _BY_KIND},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    # The indexer's scores are sums of ReLUs over its heads: with few heads many are zero, and which of equal ones are
    # the top k depends on the length of the batch.
    "deepseek_v4": {"index_n_heads": 32, "head_dim": 32, "index_head_dim": 16, "index_topk": 4, "qk_rope_head_dim": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _LATENT | _DOTS_HEADS,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _LATENT | _DOTS_HEADS,
    "granitemoehybrid": _MAMBA | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "n_groups": 1, "expand": 1},
    "qwen4_exp": {"text_config": _QSA | {"indexer_compress_ratio": 4}},
    "qwen4_exp_text": _QSA | {"indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "local"]},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": _WIDE_HEADS
    | {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": _WIDE_HEADS | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_lm_types() -> list[str]:
    """All that `AutoModelForCausalLM` has a class for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of few and small layers. Raises what the type's own checks raise."""
    config_class = CONFIG_MAPPING[model_type]
    tweaks = TWEAKS.get(model_type, {})
    try:
        default = config_class()
    except ValueError:  # its own defaults do not pass its own checks
        default = config_class(**tweaks)
    return config_class(**_smaller(default.to_dict(), tweaks))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model in float32; weights large enough for far from uniform predictions."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _smaller(default: dict[str, Any], tweaks: dict[str, Any]) -> dict[str, Any]:
    """What to give a configuration class: its own values made small, then the tweaks."""
    given: dict[str, Any] = {}
    for key, value in default.items():
        if key in SIZES and value is not None and not isinstance(value, (list, dict)):
            given[key] = SIZES[key]
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int):
            given[key] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(key, VOCABULARY - 1)
        elif key.endswith("token_id") and isinstance(value, list):
            given[key] = 2
        elif isinstance(value, dict) and ("model_type" in value or "vocab_size" in value):
            part = tweaks.get(key, {})
            given[key] = {"model_type": value["model_type"]} if "model_type" in value else {}
            given[key] |= _smaller(value, part)
    given |= _layers_of_each_kind(default)
    return given | {key: value for key, value in tweaks.items() if not isinstance(value, dict) or key not in given}


def _layers_of_each_kind(default: dict[str, Any]) -> dict[str, Any]:
    """Where lists say of every layer what it is: the first layer of each kind."""
    count = next((default[key] for key in ("num_hidden_layers", "num_layers") if default.get(key)), 0)
    lists = {k: v for k, v in default.items() if isinstance(v, list) and len(v) == count and count > 2}
    if not lists:
        return {}
    kinds = list(zip(*([repr(one) for one in values] for values in lists.values()), strict=True))
    first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())[:MOST_LAYERS]
    first = first if len(first) > 1 else [0, 1]
    key = "num_hidden_layers" if default.get("num_hidden_layers") else "num_layers"
    return {key: len(first)} | {key: [values[index] for index in first] for key, values in lists.items()}
