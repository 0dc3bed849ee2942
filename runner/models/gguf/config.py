"""Convert a llama-family GGUF header into a config in the format of the hub's config.json.

Every setting that would change what the model computes and that mlx-lm's llama cannot express is refused by name: an
error is better than a silently different model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.errors import ModelError, shorten
from runner.models.gguf.header import Header, MetadataSection, T, Value
from runner.models.gguf.tokenizer import stop_token_ids

ARCHITECTURES = ("llama",)

_NEUTRAL_VALUES: dict[str, Value] = {
    "expert_count": 0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.sliding_window": 0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}
"""Keys that change the computation, each with the one supported value, at which it does not."""


class _LlamaMetadata(MetadataSection):
    """The `llama.*` metadata."""

    prefix = "llama"

    def require(self, key: str, expected: type[T], default: T | None = None) -> T:
        value = self.get(key, expected, default)
        if value is None:
            raise ModelError(f"{self.path}: the metadata key 'llama.{key}' is missing.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.require(key, int, default)
        if not 1 <= value < 1 << 31:
            raise ModelError(f"{self.path}: 'llama.{key}' is {value}.")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a float32 as its shortest decimal: 1e-05, not 9.999999747378752e-06."""
        value = float(str(np.float32(self.require(key, float, default))))
        if not 0 < value < math.inf:
            raise ModelError(f"{self.path}: 'llama.{key}' is {value}.")
        return value


def llama_config(path: Path, header: Header, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Return the config of the llama model in `header`; errors name the file `path`.

    `rope_factors`: the values of rope_freqs.weight, (head_dim / 2,), if the file has it.

    Raises:
        ModelError: the architecture is not supported, a value is missing, of the wrong type or out of range, or a
            setting has no counterpart in mlx-lm's llama. Names the file and the key.
    """
    metadata = header.metadata
    _require_supported_file(path, metadata)
    llama = _LlamaMetadata(path, metadata)
    for key, neutral in _NEUTRAL_VALUES.items():
        value = llama.get(key, type(neutral), neutral)
        if value != neutral:
            raise ModelError(f"{path}: 'llama.{key}' is {value}, which is not supported.")
    layers = llama.count("block_count")
    if layers > len(header.tensors):
        raise ModelError(f"{path}: {layers} blocks, but only {len(header.tensors)} tensors.")
    hidden, heads = llama.count("embedding_length"), llama.count("attention.head_count")
    head_dim = llama.count("attention.key_length", max(hidden // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if llama.count(key, head_dim) != head_dim or head_dim % 2:
            raise ModelError(f"{path}: 'llama.{key}' is {llama.count(key, head_dim)}, but a head has {head_dim}.")
    kv_heads = llama.count("attention.head_count_kv", heads)
    intermediate = llama.count("feed_forward_length")
    vocabulary_size = _row_count(path, header, "token_embd.weight", hidden)
    expected = (heads * head_dim, kv_heads * head_dim, intermediate)
    actual = tuple(
        _row_count(path, header, f"blk.0.{stem}.weight", hidden) for stem in ("attn_q", "attn_k", "ffn_gate")
    )
    if expected != actual or heads % kv_heads:
        raise ModelError(f"{path}: the rows of q, k and ffn should be {expected} by its metadata, but are {actual}.")
    if rope_factors is not None and rope_factors.size != head_dim // 2:
        raise ModelError(f"{path}: rope_freqs.weight has {rope_factors.size} values, a head needs {head_dim // 2}.")
    stop_ids = stop_token_ids(metadata)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": llama.positive("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocabulary_size,
        "max_position_embeddings": llama.count("context_length"),
        "rope_theta": llama.positive("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(llama, rope_factors),
        "attention_bias": _has_bias(header, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _has_bias(header, "ffn_gate", "ffn_up", "ffn_down"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": stop_ids if len(stop_ids) > 1 else next(iter(stop_ids), None),
    }


def _require_supported_file(path: Path, metadata: dict[str, Value]) -> None:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: its architecture is {shorten(repr(architecture))}, which is not supported as GGUF (supported:"
            f" {', '.join(ARCHITECTURES)}). Use the model's Hugging Face folder or hub id instead."
        )
    if str(metadata.get("split.count", 1)) not in ("0", "1"):
        raise ModelError(f"{path}: it is one part of a split model; merge the parts first (gguf-split --merge).")


def _row_count(path: Path, header: Header, name: str, columns: int) -> int:
    """Return the number of rows of the matrix `name`, which must have `columns` columns."""
    info = header.tensors.get(name)
    if info is None:
        raise ModelError(f"{path}: tensor {name!r} is missing; the file is not a complete llama model.")
    if len(info.shape) != 2 or info.shape[1] != columns:
        raise ModelError(f"{path}: tensor {name!r} has the shape {info.shape}, not (rows, {columns}).")
    return info.shape[0]


def _has_bias(header: Header, *stems: str) -> bool:
    """Return whether any of the layers named `stems` has a bias in any block."""
    biased = {name.split(".")[-2] for name in header.tensors if name.startswith("blk.") and name.endswith(".bias")}
    return not biased.isdisjoint(stems)


def _rope_scaling(llama: _LlamaMetadata, factors: np.ndarray | None) -> dict[str, Any] | None:
    kind = llama.require("rope.scaling.type", str, "linear" if "llama.rope.scale_linear" in llama.metadata else "none")
    if kind not in ("none", "linear"):
        raise ModelError(
            f"{llama.path}: RoPE scaling {shorten(repr(kind))} is not supported (supported: linear, and Llama 3's)."
        )
    factor = llama.positive("rope.scaling.factor", llama.require("rope.scale_linear", float, 1.0))
    is_linear = kind == "linear" and factor != 1.0
    if factors is None or np.all(factors == 1):
        return {"rope_type": "linear", "factor": factor} if is_linear else None
    scaling = None if is_linear else _llama3_scaling(llama, factors)
    if scaling is None:
        raise ModelError(
            f"{llama.path}: the values of rope_freqs.weight are not those of Llama 3's RoPE scaling with its published"
            " low and high frequency factors (1 and 4), the only ones supported."
        )
    return scaling


def _llama3_scaling(llama: _LlamaMetadata, factors: np.ndarray) -> dict[str, Any] | None:
    """Return the `rope_scaling` of Llama 3.1 that yields `factors`, or None if none does.

    The formula is that of Llama 3.1's release (`apply_scaling` in its model.py).
    """
    base, head_dim = llama.positive("rope.freq_base", 10000.0), 2 * factors.size
    factor = float(np.max(factors))
    original = llama.count("rope.scaling.original_context_length", 8192)
    low, high = 1.0, 4.0
    turns = original / (2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
