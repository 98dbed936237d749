"""Tiny random models of other families than conftest's Llama, with its tokenizer: mixtures of experts, and images."""

import shutil
from pathlib import Path
from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PLAIN = {key: value for key, value in _TEXT.items() if key != "head_dim"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ONE_EXPERT = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}


def tiny_family(family: str, seed: int = 0) -> Any:
    """A model of two decoder layers, initialised from a seed."""
    import torch
    import transformers as t

    make = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_TEXT)),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_TEXT, **_EXPERTS)),
        "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
            t.Qwen2MoeConfig(**_PLAIN, **_EXPERTS, shared_expert_intermediate_size=16)
        ),
        "phimoe": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**_PLAIN, num_local_experts=4)),
        "jetmoe": lambda: t.JetMoeForCausalLM(
            t.JetMoeConfig(**{**_PLAIN, "num_attention_heads": 4}, kv_channels=8, num_local_experts=4)
        ),
        "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**{**_PLAIN, **_LATENT})),
        "llama4": lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(**_TEXT, **_ONE_EXPERT, attention_chunk_size=32)),
        "gemma3": lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config=t.Gemma3TextConfig(**_TEXT).to_dict(),
                vision_config={**_VISION, "model_type": "siglip_vision_model"},
                mm_tokens_per_image=4,
                image_token_index=49,
                boi_token_index=48,
                eoi_token_index=47,
            )
        ),
        "llava": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                text_config=t.LlamaConfig(**_TEXT),
                vision_config=t.CLIPVisionConfig(**_VISION, projection_dim=16),
                image_token_index=49,
            )
        ),
        "qwen2_vl": lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config={**_PLAIN, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
                vision_config={
                    **{"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
                    **{"mlp_ratio": 2, "patch_size": 14},
                },
                **{"image_token_id": 49, "video_token_id": 48, "vision_start_token_id": 47, "vision_end_token_id": 46},
            )
        ),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval().requires_grad_(False)


def save_family(family: str, tiny_model: Path, folder: Path) -> Path:
    """A model of the family in a folder, with the tokenizer of conftest's tiny model."""
    shutil.copytree(tiny_model, folder)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    tiny_family(family).save_pretrained(folder)
    return folder
