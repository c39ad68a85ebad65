"""Architectures beside those of `_tiny`, in the smallest config that shows what they look at."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import _tiny as tiny
import torch
import transformers

MOE: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
ROUTED = {**MOE, "output_router_logits": True}
MLA: dict[str, Any] = {
    **MOE,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
WINDOW = {"sliding_window": 4}
_NOISE = (
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "attention_dropout",
    "residual_dropout",
    "router_jitter_noise",
)
DRY = dict.fromkeys(_NOISE, 0.0)
SHARED_KEYS: dict[str, Any] = {
    **WINDOW,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

# transformers' prefix, config on top of `_tiny`'s sizes.
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", DRY),
    "gpt_bigcode": ("GPTBigCode", DRY),
    "gpt_neox": ("GPTNeoX", {}),
    "phi3": ("Phi3", {}),
    "longrope": ("Phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
    "dynamic_ntk": ("Llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    "qwen3_moe": ("Qwen3Moe", ROUTED),
    "gpt_oss": ("GptOss", {**ROUTED, **WINDOW}),  # sinks
    "deepseek_v2": ("DeepseekV2", MLA),
    "deepseek_v3": ("DeepseekV3", MLA),
    "longcat": ("LongcatFlash", MLA),
    "cohere2": ("Cohere2", WINDOW),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", WINDOW),
    "olmoe": ("Olmoe", ROUTED),
    "granite_moe": ("GraniteMoe", ROUTED),
    "phimoe": ("Phimoe", {**ROUTED, **DRY}),
    "minimax_m2": ("MiniMaxM2", ROUTED),
    "ernie_moe": ("Ernie4_5_Moe", ROUTED),
    "smollm3": ("SmolLM3", {}),
    "starcoder2": ("Starcoder2", WINDOW),
    "stablelm": ("StableLm", {}),
    "modernbert": ("ModernBertDecoder", {"local_attention": 8}),
    "gemma4": ("Gemma4Text", {**WINDOW, "vocab_size_per_layer_input": 320}),
    "gemma4_shared_keys": ("Gemma4Text", SHARED_KEYS),
    "glm4": ("Glm4", {}),
    "glm4_moe": ("Glm4Moe", MLA),
    "exaone4": ("Exaone4", WINDOW),
    "ministral": ("Ministral", WINDOW),
    "mimo": ("MiMoV2Flash", {**MOE, **WINDOW}),
    "diffllama": ("DiffLlama", {}),
    "helium": ("Helium", {}),
    "apertus": ("Apertus", {}),
    "persimmon": ("Persimmon", {}),
    "bitnet": ("BitNet", {}),
    "seed_oss": ("SeedOss", DRY),
    "nemotron": ("Nemotron", {}),
    "hunyuan": ("HunYuanDenseV1", {}),
}
_HALVES = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
REGISTRY = "attention that is not looked up in transformers' registry"
# The same, and why it is left alone.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon_h1": (*tiny.MODELS["falcon_h1"], "a state along the row"),
    "mamba": ("Mamba", {}, "a state along the row"),
    "qwen3_next": ("Qwen3Next", {**MOE, **_LINEAR, **_HALVES}, "a state along the row"),
    "minimax": ("MiniMax", {**MOE, **_HALVES}, "layers of linear_attention"),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of conv"),
    "deepseek_v32": (
        "DeepseekV32",
        {**MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
        "layers of indexed_attention",
    ),
    "bloom": ("Bloom", {"n_head": 4}, REGISTRY),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, REGISTRY),
    "doge": ("Doge", {}, "attention that is looked up in a registry of its own"),
    "bidirectional": ("Llama", {"is_causal": False}, "attention that is not causal"),
    # Its weights are so small that no token's neighbours show in its hidden states.
    "bert": ("Bert", {"initializer_range": 1e-3, **DRY}, "attention that is not causal"),
    "cross": ("GPT2", {"add_cross_attention": True, **DRY}, "attention to another sequence"),
    "opt": ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}, "off when packed"),
}
# Their attention is in the registry since transformers 5.24.
for _name, _prefix in {"gptj": "GPTJ", "codegen": "CodeGen"}.items():
    _file = import_module(f"transformers.models.{_name}.modeling_{_name}")
    if hasattr(_file, "ALL_ATTENTION_FUNCTIONS"):
        RIGHT[_name] = (_prefix, {"rotary_dim": 8})
    else:
        REFUSED[_name] = (_prefix, {"rotary_dim": 8}, REGISTRY)


def model(prefix: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**tiny._settings(), **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def llava() -> Any:
    """Pictures and text; only text comes."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**tiny._settings()),
        image_token_index=2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()
