"""A model of every causal type of transformers with some ten thousand parameters, from its config.

Every layer type of a config stays, once or twice each; what a type counts in a way of its own is in
`OWN`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
WORDS = 256
MOST = 50_000_000  # parameters

_NAMES = {
    64: "hidden_size n_embd d_model dim emb_dim lru_width word_embed_proj_dim embedding_size",
    96: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size",
    24: "q_lora_rank",
    16: "kv_lora_rank v_head_dim qk_head_dim sliding_window linear_key_head_dim mamba_d_head "
    "linear_value_head_dim global_head_dim linear_head_dim mamba_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim state_size mamba_n_heads mamba_num_heads "
    "mamba_d_state hidden_size_per_layer_input laurel_rank adapter_rank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_local_experts "
    "encoder_attention_heads num_experts n_routed_experts moe_num_experts linear_num_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers eos_token_id "
    "num_key_value_heads num_experts_per_tok num_experts_per_token linear_num_value_heads moe_k "
    "linear_num_key_heads num_global_key_value_heads moe_topk zero_expert_num",
    1: "n_group topk_group num_expert_group first_k_dense_replace n_groups mamba_n_groups "
    "bos_token_id n_shared_experts",
    0: "pad_token_id",
    128: "max_position_embeddings n_positions n_ctx",
    WORDS: "vocab_size n_words vocab_size_per_layer_input",
}
SMALL: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}
SMALL["initializer_range"] = 0.3  # with the default every loss is log V, and hides mistakes
_LAYERS = {"num_hidden_layers", "n_layer", "num_layers"}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HYBRID = ["linear_attention", "hybrid", "hybrid"]
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "dory": {
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp"] * 2 + ["full_attention", "mlp"],
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": None,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "num_hidden_layers": 3,
        "layer_types": _HYBRID,
        "hybrid_layer_ids": [1, 2],
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
        "num_query_groups": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "kv_channels": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def build(kind: str) -> PreTrainedModel:
    """In evaluation mode. ValueError where it would not be small."""
    torch.manual_seed(0)
    config = _config(kind)
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = made(config).num_parameters()
    if size > MOST:
        raise ValueError(f"{kind}: expected at most {MOST:,} parameters, got {size:,}")
    model: PreTrainedModel = made(_config(kind)).eval()
    return model


def _config(kind: str) -> Any:
    base = CONFIG_MAPPING[kind]()
    if base.get_text_config() is not base:
        raise ValueError(f"{kind}: expected a config of text, got one with others beside it")
    names = base.to_dict()
    sizes = {name: size for name, size in SMALL.items() if name in names}
    if "head_dim" in names:  # of MLA the rotated part
        sizes["head_dim"] = 8 if "qk_rope_head_dim" in names else 16
    if "qk_rope_head_dim" in names:
        sizes["num_key_value_heads"] = 4
    kinds = list(dict.fromkeys(names.get("layer_types") or ()))
    if kinds:
        sizes["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        sizes |= dict.fromkeys(_LAYERS & names.keys(), len(sizes["layer_types"]))
    return type(base)(**{**sizes, **OWN.get(kind, {})})
