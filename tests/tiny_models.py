"""Model folders of many architectures at a tiny size, with fixed random weights and the byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, quantize_model, save_config, save_model

from runner.models import tiny

_DENSE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "qwen3": _DENSE,
    "gemma2": {**_DENSE, "num_hidden_layers": 2},
    "qwen3_moe": {
        **_DENSE,
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        **_DENSE,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mamba": {
        "hidden_size": 64,
        "vocab_size": 320,
        "intermediate_size": 128,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 32,
        "tie_word_embeddings": False,
    },
    "llama4": {
        "text_config": {
            **_DENSE,
            "num_hidden_layers": 4,
            "model_type": "llama4_text",
            "attention_bias": False,
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 128,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "rope_scaling": None,
            "use_qk_norm": True,
        }
    },
    "deepseek_v3": {
        **_DENSE,
        **_LATENT,
        "num_hidden_layers": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {
        **_DENSE,
        **_LATENT,
        "num_hidden_layers": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
    "longcat_flash": {
        **_DENSE,
        **_LATENT,
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 128,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 64,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "num_layers": 2,
        "routed_scaling_factor": 1.0,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_bias": False,
    },
    "kimi_linear": {
        **_DENSE,
        **{key: value for key, value in _LATENT.items() if key != "q_lora_rank"},
        "num_hidden_layers": 2,
        "linear_attn_config": {
            "full_attn_layers": [2],
            "kda_layers": [1],
            "num_heads": 2,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 512,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
}
"""By model type; what differs among them: window, experts, latent attention, recurrent state, capped logits."""

MIXED = "mixed"
"""A mode of `write_model`: 4-bit layers, but 8-bit attention, mxfp4 in the last block, an unquantized output layer."""


def build_model(model_type: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model with random float32 weights of moderate size, and its config."""
    config = {
        "model_type": model_type,
        "eos_token_id": 2,
        "bos_token_id": 1,
        **json.loads(json.dumps(CONFIGS[model_type])),
    }
    mx.random.seed(seed)  # what the constructors draw and the loop below does not replace
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    weights = []
    for i, (name, array) in enumerate(sorted(tree_flatten(model.parameters()))):
        key = mx.random.key(1000 * seed + i)
        if not mx.issubdtype(array.dtype, mx.floating):
            weights.append((name, array))
        elif array.ndim == 1:
            weights.append((name, array + 0.1 * mx.random.normal(array.shape, key=key)))
        else:
            weights.append((name, mx.random.normal(array.shape, key=key) * array.shape[-1] ** -0.5))
    model.update(tree_unflatten(weights))
    return model, config


def write_model(
    folder: Path,
    model_type: str,
    *,
    dtype: mx.Dtype = mx.float32,
    mode: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    global_scale: bool = False,
) -> Path:
    """Write the model as `mlx_lm.convert` does, cast to `dtype` and quantized by `mode` if given; return `folder`."""
    model, config = build_model(model_type)
    may_cast = getattr(model, "cast_predicate", lambda _: True)
    model.update(
        tree_unflatten(
            [
                (name, array.astype(dtype) if may_cast(name) and mx.issubdtype(array.dtype, mx.floating) else array)
                for name, array in tree_flatten(model.parameters())
            ]
        )
    )
    if mode is not None:
        model, config = quantize_model(
            model,
            config,
            group_size,
            bits,
            mode="affine" if mode == MIXED else mode,
            global_scale=global_scale,
            quant_predicate=_mixed(len(model.layers)) if mode == MIXED else None,
        )
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


def _mixed(layers: int) -> Any:
    def predicate(path: str, _: nn.Module) -> bool | dict[str, Any]:
        if "lm_head" in path:
            return False
        if f"layers.{layers - 1}." in path:
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        if "attn" in path:
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        return True

    return predicate
