"""Tiny models of each family of mlx-lm, written as GGUF files by the rules of llama.cpp's converter.

The names, the metadata and what happens to the weights are written down here anew, not taken from the reader.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf_files
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

VOCABULARY = 268
"""The tokens of `gguf_files.vocabulary`."""

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_LONG = [1.0 + 0.5 * i for i in range(6)]


@dataclass(frozen=True)
class Case:
    """A model and how its file differs from what the architecture's name says."""

    architecture: str
    config: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    """Metadata besides the sizes, without the architecture's prefix."""
    factors: dict[str, list[float]] = field(default_factory=dict)
    """Tensors of RoPE factors."""


def _case(architecture: str, model_type: str, metadata: dict[str, Any] | None = None, **config: Any) -> Case:
    return Case(architecture, COMMON | {"model_type": model_type} | config, metadata or {})


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2}
_GEMMA = {"head_dim": 32, "rms_norm_eps": 1e-6}
_YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
}

CASES = {
    "llama": _case("llama", "llama", {"rope.dimension_count": 16, "vocab_size": VOCABULARY}),
    "mistral-nemo": _case("llama", "mistral", head_dim=32, tie_word_embeddings=False, rope_theta=1e6),
    "llama-yarn": _case("llama", "llama", _YARN_KEYS, rope_scaling=_YARN),
    "mixtral": _case(
        "llama", "mixtral", _EXPERT_KEYS, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "qwen2": _case("qwen2", "qwen2", rope_theta=1e6),
    "qwen2-yarn": _case(
        "qwen2", "qwen2",
        _YARN_KEYS | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        rope_scaling=_YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, tie_word_embeddings=False,
    ),
    "qwen3": _case("qwen3", "qwen3", head_dim=32),
    "qwen2moe": _case(
        "qwen2moe", "qwen2_moe",
        _EXPERT_KEYS | {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48},
        **_EXPERTS, shared_expert_intermediate_size=48, tie_word_embeddings=False,
    ),
    "qwen3moe": _case(
        "qwen3moe", "qwen3_moe", _EXPERT_KEYS | {"expert_feed_forward_length": 32},
        **_EXPERTS, head_dim=32, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
    ),
    "gemma": _case("gemma", "gemma", **_GEMMA),
    "gemma2": _case(
        "gemma2", "gemma2",
        {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "attention.sliding_window": 512},
        **_GEMMA, attn_logit_softcapping=20.0, final_logit_softcapping=10.0, query_pre_attn_scalar=32,
    ),
    "gemma2-27b": _case(  # the file does not hold the scale of the queries; llama.cpp knows the model by its 46 blocks
        "gemma2", "gemma2",
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 512},
        **_GEMMA, num_hidden_layers=46, hidden_size=32, intermediate_size=32, query_pre_attn_scalar=8,
    ),
    "gemma3": _case(
        "gemma3", "gemma3_text",
        {"attention.sliding_window": 8, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        **_GEMMA, num_hidden_layers=7, query_pre_attn_scalar=32, sliding_window=8, sliding_window_pattern=6,
        rope_theta=1e6, rope_local_base_freq=10000.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3-pattern": _case(
        "gemma3", "gemma3_text",
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 5000.0},
        **_GEMMA, num_hidden_layers=3, query_pre_attn_scalar=32, sliding_window=8, sliding_window_pattern=2,
        rope_local_base_freq=5000.0, tie_word_embeddings=False,
    ),
    "phi3": _case("phi3", "phi3", {"attention.sliding_window": 512}, tie_word_embeddings=False),
    "phi3-long": Case(
        "phi3",
        COMMON | {
            "model_type": "phi3", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "long_factor": _LONG, "short_factor": [1.0] * 6},
        },
        {
            "rope.dimension_count": 12, "attention.sliding_window": 0, "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(512 / 64) / math.log(64)),
        },
        {"rope_factors_long.weight": _LONG, "rope_factors_short.weight": [1.0] * 6},
    ),
}  # fmt: skip

_NAMES = (
    (r"^model\.embed_tokens\.", "token_embd."),
    (r"^model\.norm\.", "output_norm."),
    (r"^lm_head\.", "output."),
    (r"^model\.layers\.(\d+)\.", r"blk.\1."),
    (r"input_layernorm", "attn_norm"),
    (r"pre_feedforward_layernorm", "ffn_norm"),
    (r"post_feedforward_layernorm", "post_ffw_norm"),
    (r"self_attn\.(q|k|v|qkv)_proj", r"attn_\1"),
    (r"self_attn\.(q|k)_norm", r"attn_\1_norm"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"(?:mlp|block_sparse_moe)\.switch_mlp\.(gate|up|down)_proj", r"ffn_\1_exps"),
    (r"mlp\.shared_expert\.(gate|up|down)_proj", r"ffn_\1_shexp"),
    (r"mlp\.shared_expert_gate", "ffn_gate_inp_shexp"),
    (r"(?:mlp|block_sparse_moe)\.gate\.", "ffn_gate_inp."),
    (r"mlp\.gate_up_proj", "ffn_up"),
    (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
)


def tensor_name(parameter: str, architecture: str) -> str:
    """Return llama.cpp's name of a parameter."""
    is_sandwich = architecture in ("gemma2", "gemma3")
    parameter = parameter.replace("post_attention_layernorm", "post_attention_norm" if is_sandwich else "ffn_norm")
    for pattern, name in _NAMES:
        parameter = re.sub(pattern, name, parameter)
    return parameter


def build_model(config: dict[str, Any]) -> nn.Module:
    """Return a model of mlx-lm with random weights."""
    mx.random.seed(3)
    model_type = "llama" if config["model_type"] == "mistral" else config["model_type"]
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if model_type == "gemma3_text" and config["tie_word_embeddings"]:
        model.sanitize({})
    model.update(tree_map(lambda array: array + 0.2 * mx.random.normal(array.shape), model.parameters()))
    model.eval()
    return model


def metadata_of(case: Case) -> dict[str, Any]:
    """Return the metadata that the converter writes for the config."""
    config, prefix = case.config, case.architecture
    values: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    if prefix not in ("gemma", "gemma2"):
        values["rope.freq_base"] = config["rope_theta"]
    if "head_dim" in config:
        values |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    values |= case.metadata
    metadata = {f"{prefix}.{key}": value for key, value in values.items()}
    return {"general.architecture": prefix} | metadata | gguf_files.vocabulary()


def write_weights(
    case: Case, weights: dict[str, np.ndarray], encode: Callable[[str, np.ndarray], tuple[str, bytes]] | None = None
) -> gguf_files.GgufFile:
    """Return the file of a model with these weights; `encode` returns a tensor's type and bytes by its name."""
    file = gguf_files.GgufFile(metadata_of(case))
    for parameter, values in weights.items():
        name = tensor_name(parameter, case.architecture)
        if case.architecture == "llama" and re.search(r"\.attn_[qk]\.", name):
            key = "num_attention_heads" if ".attn_q." in name else "num_key_value_heads"
            values = gguf_files.permute_rows(values, case.config[key])
        if case.architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if name.endswith("ffn_gate_inp_shexp.weight"):
            values = values.reshape(-1)
        type_name, raw = encode(name, values) if encode else ("F32", values.astype("<f4").tobytes())
        file.tensors[name] = (type_name, values.shape, raw)
    for name, factors in case.factors.items():
        file.tensors[name] = ("F32", (len(factors),), np.array(factors, "<f4").tobytes())
    return file


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the parameters of a model by name."""
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}
