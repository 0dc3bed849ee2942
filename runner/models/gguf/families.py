"""The GGUF architectures that are read: how each maps to a model class of mlx-lm.

A family names the parameter of each tensor, says what llama.cpp's converter did to the weights (rows of q and k
interleaved, 1 added to the norms of Gemma), and converts the metadata that is its own. The rules are those of
llama.cpp's converter and of its hyper-parameters where the file leaves one out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runner.common.errors import ModelError
from runner.models.gguf.header import Value
from runner.models.gguf.metadata import ArchitectureMetadata


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that every architecture has."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int


Settings = Callable[[ArchitectureMetadata, ModelShape, list[str]], dict[str, Any]]
"""Return a family's own part of config.json; may append lines for the log to its last argument."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the files of one architecture become a model of mlx-lm."""

    model_type: str
    class_name: str
    """`architectures` in config.json."""
    modules: Mapping[str, str]
    """The module, relative to its block, of each tensor of a block."""
    settings: Settings
    rope_scalings: frozenset[str] = frozenset()
    """The kinds of RoPE scaling that the model class computes."""
    computes_head_dim: bool = True
    """Whether the model class divides the hidden size by the heads instead of reading `head_dim`."""
    rotates_part: bool = False
    """Whether only `rope.dimension_count` of a head may be rotated."""
    interleaves_rows: bool = False
    """Whether the file holds the rows of q and k in llama.cpp's order."""
    norm_offset: float = 0.0
    """What the file's norm weights have more than the model's."""
    overflows_float16: bool = False
    """Whether activations exceed the range of float16, so that bfloat16 is the 16-bit type to compute in."""
    bias_flags: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The settings of config.json that say whether any of these tensors has a bias; missing ones are zero."""


NEUTRAL_VALUES: dict[str, Value] = {
    "expert_count": 0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
}
"""Keys that change the computation, each with the value at which it does not. A family may read some of them itself."""

IGNORED_KEYS = frozenset(
    {
        "vocab_size",
        "tensor_data_layout",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "expert_count",
        "expert_used_count",
    }
)
"""Keys that describe the file, or matter only with another key; the sizes among them are checked by the tensors."""

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _experts(module: str) -> dict[str, str]:
    return {
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": f"{module}.gate",
        "ffn_gate_exps": f"{module}.switch_mlp.gate_proj",
        "ffn_up_exps": f"{module}.switch_mlp.up_proj",
        "ffn_down_exps": f"{module}.switch_mlp.down_proj",
    }


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})


def find_family(metadata: ArchitectureMetadata) -> Family:
    """Return the family of the architecture; one of llama with experts is Mixtral's."""
    if metadata.prefix == "llama" and metadata.get("expert_count", int, 0) != 0:
        return MIXTRAL
    return FAMILIES[metadata.prefix]


def _llama(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    return {"hidden_act": "silu"}


def _qwen(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    return {"hidden_act": "silu"}


def _expert_counts(metadata: ArchitectureMetadata) -> tuple[int, int]:
    count, used = metadata.count("expert_count"), metadata.count("expert_used_count")
    if used > count:
        raise ModelError(f"{metadata.path}: it uses {used} experts of {count}.")
    return count, used


def _mixtral(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    count, used = _expert_counts(metadata)
    return {"hidden_act": "silu", "num_local_experts": count, "num_experts_per_tok": used}


def _qwen2_moe(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    count, used = _expert_counts(metadata)
    metadata.require_neutral({"expert_weights_norm": False, "expert_weights_scale": 1.0})
    return {"hidden_act": "silu", "num_experts": count, "num_experts_per_tok": used, "norm_topk_prob": False}


def _qwen3_moe(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    count, used = _expert_counts(metadata)
    metadata.require_neutral({"expert_weights_norm": True, "expert_weights_scale": 1.0})
    experts = {"num_experts": count, "num_experts_per_tok": used, "norm_topk_prob": True}
    return {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []} | experts


def _gemma(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh"}


def _query_scalar(metadata: ArchitectureMetadata, shape: ModelShape, layers_of_27b: int) -> float:
    """Return `query_pre_attn_scalar`: the file leaves it out, and of Gemma only the 27B models have an own one."""
    scale = metadata.get("attention.scale", float, 0.0)
    if scale:
        return float(np.float32(metadata.positive("attention.scale")) ** -2)
    return shape.hidden / shape.heads if shape.layers == layers_of_27b else shape.head_dim


def _note_window(model: str, window: int, shape: ModelShape, notes: list[str]) -> None:
    if 0 < window < shape.context:
        notes.append(
            f"{model} attends to a window of {window:,} tokens in some layers, which mlx-lm does not: longer rows are"
            " computed with full attention"
        )


def _gemma2(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    window = metadata.count("attention.sliding_window", 4096)
    _note_window("Gemma 2", window, shape, notes)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": metadata.positive("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.positive("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(metadata, shape, 46),
        "sliding_window": window,
    }


def _gemma3(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    window = metadata.get("attention.sliding_window", int, 0)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(metadata, shape, 62),
        "sliding_window": metadata.count("attention.sliding_window") if window else shape.context,
        "sliding_window_pattern": _window_pattern(metadata, shape) if window else 1,
        "rope_local_base_freq": metadata.positive("rope.freq_base_swa", 10000.0),
    }


def _window_pattern(metadata: ArchitectureMetadata, shape: ModelShape) -> int:
    """Return every how many layers one attends to everything: 6 unless the file says otherwise."""
    key = f"{metadata.prefix}.attention.sliding_window_pattern"
    metadata.used.add(key)
    value = metadata.metadata.get(key, 6)
    if isinstance(value, np.ndarray):
        full = np.flatnonzero(value == 0)
        period = int(full[0]) + 1 if full.size else 0
        expected = [(i + 1) % period != 0 for i in range(shape.layers)] if period else []
        if not period or value.astype(bool).tolist() != expected:
            raise ModelError(f"{metadata.path}: '{key}' has no regular period, which is not supported.")
        return period
    return metadata.count("attention.sliding_window_pattern", 6)


def _phi3(metadata: ArchitectureMetadata, shape: ModelShape, notes: list[str]) -> dict[str, Any]:
    window = metadata.require("attention.sliding_window", int, 0)
    _note_window("Phi-3", window, shape, notes)
    return {
        "hidden_act": "silu",
        "partial_rotary_factor": metadata.count("rope.dimension_count", shape.head_dim) / shape.head_dim,
        "original_max_position_embeddings": metadata.count("rope.scaling.original_context_length", shape.context),
        "sliding_window": window or None,
    }


MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", _ATTENTION | _experts("block_sparse_moe"), _mixtral, interleaves_rows=True
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _ATTENTION | _MLP,
        _llama,
        rope_scalings=frozenset({"linear", "yarn", "llama3"}),
        computes_head_dim=False,
        interleaves_rows=True,
        bias_flags={
            "attention_bias": _QKV | {"attn_output"},
            "mlp_bias": frozenset({"ffn_gate", "ffn_up", "ffn_down"}),
        },
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _ATTENTION | _MLP,
        _qwen,
        rope_scalings=frozenset({"linear", "yarn"}),
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _ATTENTION | _QK_NORMS | _MLP,
        _qwen,
        rope_scalings=frozenset({"linear", "yarn"}),
        computes_head_dim=False,
    ),
    "qwen2moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _ATTENTION
        | _experts("mlp")
        | {
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        _qwen2_moe,
    ),
    "qwen3moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _ATTENTION | _QK_NORMS | _experts("mlp"),
        _qwen3_moe,
        computes_head_dim=False,
    ),
    "gemma": Family(
        "gemma",
        "GemmaForCausalLM",
        _ATTENTION | _MLP,
        _gemma,
        computes_head_dim=False,
        norm_offset=1.0,
        overflows_float16=True,
    ),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        _ATTENTION | _MLP | _SANDWICH_NORMS,
        _gemma2,
        computes_head_dim=False,
        norm_offset=1.0,
        overflows_float16=True,
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _ATTENTION | _QK_NORMS | _MLP | _SANDWICH_NORMS,
        _gemma3,
        rope_scalings=frozenset({"linear"}),
        computes_head_dim=False,
        norm_offset=1.0,
        overflows_float16=True,
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        _phi3,
        rope_scalings=frozenset({"longrope"}),
        rotates_part=True,
    ),
}
"""The family of each architecture, by `general.architecture`."""
