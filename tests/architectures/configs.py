"""A tiny random configuration of every architecture of mlx-lm that can be built.

`tiny_config` gives every architecture the same `FIELDS`, of which it reads those that it knows, and what `SPECIAL`
holds for it. Attention windows are shorter than `ROW_LENGTH`, every model has more blocks than a test adapts, and every
pattern of blocks (sliding and full, dense and mixture, recurrent and attention) occurs on both sides of that cut.
"""

from __future__ import annotations

import pkgutil
from typing import Any

import mlx_lm.models

VOCABULARY = 128
ROW_LENGTH = 24
"""Tokens of a test's rows; longer than any window."""
WINDOW = 8
LAYERS = 6

FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layers": LAYERS,
    "n_layer": LAYERS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "n_kv_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "n_embd": 32,
    "d_model": 32,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_bias": False,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rotary_dim": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "conv_kernel": 4,
    "use_bias": True,
    "use_conv_bias": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
    "linear_allow_neg_eigval": False,
}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": WINDOW}
GRANITE = {"logits_scaling": 2.0, "attention_multiplier": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
KIMI_LINEAR = {
    "num_heads": 4,
    "head_dim": 8,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3, 5],
    "full_attn_layers": [2, 4, 6],
}
ROPE_BY_TYPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
}
LFM2 = {
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 48,
    "block_multiple_of": 4,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
}
LLAMA4 = {
    "attention_chunk_size": WINDOW,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 48,
    "use_qk_norm": True,
    "num_experts_per_tok": 1,
    "rope_scaling": None,
}
LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
MINICPM = {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0}
MISTRAL_ROPE = {
    "layer_types": MIXED,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.1,
    },
}
GEMMA4 = {
    "sliding_window_pattern": 2,
    "layer_types": MIXED,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "final_logit_softcapping": 30.0,
    "num_experts": 0,
    "rope_parameters": ROPE_BY_TYPE,
}

NESTED = (
    "gemma3",
    "gemma3n",
    "gemma4",
    "kimi_k25",
    "kimi_vl",
    "lfm2-vl",
    "llama4",
    "minimax_m3_vl",
    "mistral3",
    "muse_spark",
    "pixtral",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "kimi_k3",
)
"""Architectures that read the language model's fields from text_config."""

SPECIAL: dict[str, dict[str, Any]] = {
    "Klear": {"mlp_only_layers": [0], "decoder_sparse_step": 2},
    "afm7": {"hidden_dim": 32, "num_kv_reuse_layers": 2},
    "afmoe": {"layer_types": MIXED},
    "apertus": {"mlp_bias": False, "post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2, 4], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1, "num_key_value_heads": 4},
    "bailing_moe_v3": {"layer_group_size": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "topk_method": "gready",
        "scoring_func": "softmax",
    },
    "deepseek_v32": INDEX,
    "deepseek_v41": {"head_dim": 16, "qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2, **INDEX},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone_moe": {"layer_types": MIXED, "is_moe_layer": [False] + [True] * (LAYERS - 1)},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
    "gear": {"layer_types": ["conv", "sliding_attention", "full_attention"] * 2},
    "gemma3": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": MIXED,
        "activation_sparsity_pattern": [0.5] * LAYERS,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 4,
    },
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4,
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {"rope_scaling": None, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, **INDEX},
    "gpt_bigcode": {"n_inner": 48},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"layer_types": MIXED},
    "granite": {**GRANITE, "mlp_bias": False},
    "granitemoe": GRANITE,
    "granitemoehybrid": {
        **GRANITE,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention"] * (LAYERS // 2),
    },
    "helium": {"mlp_bias": False},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "iquestloopcoder": {"loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_k3": {
        "hidden_act": "situ",
        "activation_situ_beta": 1.0,
        "activation_situ_linear_beta": 1.0,
        "attn_res_block_size": 2,
        "routed_expert_hidden_size": 16,
        "linear_attn_config": KIMI_LINEAR,
    },
    "kimi_linear": {"linear_attn_config": KIMI_LINEAR, "model_max_length": 256},
    "laguna": {
        "layer_types": MIXED,
        "partial_rotary_factor": 0.5,
        "rope_parameters": ROPE_BY_TYPE,
    },
    "lfm2": LFM2,
    "lfm2-vl": LFM2,
    "lfm2_moe": {**LFM2, "use_expert_bias": True, "num_dense_layers": 1},
    "lille-130m": {"block_size": 256, "n_embd": 64},
    "llama4": LLAMA4,
    "llama4_text": {**LLAMA4, "no_rope_layers": [1, 0] * (LAYERS // 2)},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 2, "emb_split_num": 2},
    "mamba": {"time_step_rank": 4, "intermediate_size": 64},
    "mamba2": {"n_groups": 2, "time_step_limit": [0.01, 10.0], "time_step_rank": "auto"},
    "mellum": {"layer_types": MIXED, "rope_parameters": ROPE_BY_TYPE},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1] * (LAYERS // 2),
        "moe_layer_freq": [0] + [1] * (LAYERS - 1),
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
        "partial_rotary_factor": 0.5,
    },
    "minicpm": MINICPM,
    "minicpm3": {**MINICPM, "rope_scaling": {"original_max_position_embeddings": 64}},
    "minimax": {"num_key_value_heads": 4, "layer_types": MIXED, "attn_type_list": [0, 1] * (LAYERS // 2)},
    "minimax_m3_vl": {"dense_intermediate_size": 48, "moe_layer_freq": [0] + [1] * (LAYERS - 1)},
    "ministral3": MISTRAL_ROPE,
    "mistral4": MISTRAL_ROPE,
    "muse_spark": {
        "post_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0},
        "layer_rope_theta": [10000.0, 0.0] * (LAYERS // 2),
        "layer_types": MIXED,
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.5,
        "moe_hidden_size": 16,
        "num_shared_experts": 0,
    },
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.5, "no_op": False, "replace_with_linear": False},
            }
        ]
        * LAYERS
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "time_step_limit": [0.01, 10.0],
        "mlp_bias": False,
        "hybrid_override_pattern": ["M", "*", "-"] * (LAYERS // 3),
    },
    "olmo_hybrid": {**LINEAR, "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "openelm": {
        "num_transformer_layers": LAYERS,
        "model_dim": 32,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.5] * LAYERS,
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3small": {
        "vocab_size": 100_352,  # it masks fixed token ids up to that one
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 48,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 64,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 2,
    },
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": 32},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 8, "mamba_num_heads": 4, "full_attention_idx": [1]},
    "qwen": {"kv_channels": 8},
    "qwen3_5": LINEAR,
    "qwen3_5_moe": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "block_types": ["recurrent", "attention"],
        "_block_types": ["recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "solar_open": {"partial_rotary_factor": 0.5},
    "spark2_5": {"layer_types": MIXED, "rope_parameters": ROPE_BY_TYPE, "hidden_act": "gelu"},
    "stablelm": {"use_qkv_bias": False, "partial_rotary_factor": 0.5},
    "step3p5": {
        "num_attention_groups": 2,
        "layer_types": MIXED,
        "moe_top_k": 2,
        "share_expert_dim": 24,
        "moe_layers_enum": "1,2,3,4,5",
    },
}
"""What an architecture needs beyond `FIELDS`."""


def tiny_config(name: str) -> dict[str, Any]:
    """Return the config.json of a tiny model of mlx_lm.models.`name`."""
    config = {**FIELDS, "model_type": name, **SPECIAL.get(name, {})}
    return {**config, "text_config": dict(config)} if name in NESTED else config


NOT_BUILT = {
    "bitnet": "its layers are Metal kernels",
    "muse_spark": "its attention is a Metal kernel",
    "olmo": "it needs the package ai2-olmo",
    "prism_hadamard_qwen35": "it exists in one packed form only",
}
"""Architectures that cannot be built here, and why."""
NOT_MODELS = (
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
)
"""Modules of mlx_lm.models that hold no model."""


NOT_TRAINED_BY_STOCK = {
    "deepseek_v41": "the indices that it gathers by depend on trained layers",
    "gemma3n": "it reads the weight of a layer that has an adapter",
    "kimi_k3": "it reads the weight of a layer that has an adapter",
    "recurrent_gemma": "its class lacks what freezing needs",
}
"""Architectures that stock mlx-lm cannot train with an adapter on every layer, and why."""


NOT_LOADED_BY_STOCK = {"afm7": "stock mlx-lm refuses every adapter of it, its own too"}


def architectures() -> list[str]:
    """Return every architecture of mlx-lm that can be built."""
    names = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return [name for name in names if name not in NOT_MODELS and name not in NOT_BUILT]
