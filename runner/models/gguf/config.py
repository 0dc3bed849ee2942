"""A llama-family GGUF header as a config in the style of the hub's config.json.

Anything that would change what the model computes and has no counterpart in mlx-lm's llama is refused by name:
a wrong result is worse than none.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

import numpy as np

from runner.common.errors import ModelError
from runner.common.text import shorten
from runner.models.gguf.header import Header, Value
from runner.models.gguf.tokenizer import ending_ids

T = TypeVar("T")

ARCHITECTURES = ("llama",)

# Keys that alter the computation: (key, the value that leaves it as it is).
_INERT: dict[str, Value] = {
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


class _Llama:
    """The `llama.*` values, each of the type it must have."""

    def __init__(self, path: Path, metadata: dict[str, Value]) -> None:
        self.path, self.metadata = path, metadata

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value: object = self.metadata.get(f"llama.{key}", default)
        if value is None:
            raise ModelError(f"{self.path}: the metadata key 'llama.{key}' is missing.")
        if not isinstance(value, kind) or type(value) is not kind:  # a bool is no int here
            found = "a list" if isinstance(value, list | np.ndarray) else shorten(repr(value), 80)
            raise ModelError(f"{self.path}: 'llama.{key}' is {found}, where one {kind.__name__} is supported.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        number = self.get(key, int, default)
        if not 1 <= number < 1 << 31:
            raise ModelError(f"{self.path}: 'llama.{key}' is {number}.")
        return number

    def positive(self, key: str, default: float | None = None) -> float:
        """A float32 of the file as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
        number = float(str(np.float32(self.get(key, float, default))))
        if not 0 < number < math.inf:
            raise ModelError(f"{self.path}: 'llama.{key}' is {number}.")
        return number


def llama_config(path: Path, header: Header, rope_factors: np.ndarray | None) -> dict:
    """The config of the llama model in `header`; `rope_factors` are the values of rope_freqs.weight, if there.

    Raises ModelError, naming the file and the key, for another architecture, a value that is missing, of the
    wrong type or out of range, and a setting that mlx-lm's llama cannot express.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: its architecture is {shorten(repr(architecture))}, which is not supported as GGUF (supported:"
            f" {', '.join(ARCHITECTURES)}). Use the model's Hugging Face folder or hub id instead."
        )
    if str(metadata.get("split.count", 1)) not in ("0", "1"):
        raise ModelError(f"{path}: it is one part of a split model; join the parts first (gguf-split --merge).")
    llama = _Llama(path, metadata)
    for key, inert in _INERT.items():
        value = llama.get(key, type(inert), inert)
        if value != inert:
            raise ModelError(f"{path}: 'llama.{key}' is {value}, which is not supported here.")
    layers = llama.count("block_count")
    if layers > len(header.tensors):
        raise ModelError(f"{path}: {layers} blocks, but only {len(header.tensors)} tensors.")
    hidden, heads = llama.count("embedding_length"), llama.count("attention.head_count")
    width = llama.count("attention.key_length", max(hidden // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if llama.count(key, width) != width or width % 2:
            raise ModelError(f"{path}: 'llama.{key}' is {llama.count(key, width)}, but a head is {width} wide.")
    kv_heads = llama.count("attention.head_count_kv", heads)
    inner = llama.count("feed_forward_length")
    vocabulary = _rows(path, header, "token_embd.weight", hidden)
    said = (heads * width, kv_heads * width, inner)
    held = tuple(_rows(path, header, f"blk.0.{stem}.weight", hidden) for stem in ("attn_q", "attn_k", "ffn_gate"))
    if said != held or heads % kv_heads:
        raise ModelError(f"{path}: widths of q, k and ffn should be {said} by its metadata, but are {held}.")
    if rope_factors is not None and rope_factors.size != width // 2:
        raise ModelError(f"{path}: rope_freqs.weight has {rope_factors.size} values, a head needs {width // 2}.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "hidden_act": "silu",
        "rms_norm_eps": llama.positive("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocabulary,
        "max_position_embeddings": llama.count("context_length"),
        "rope_theta": llama.positive("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(llama, rope_factors),
        "attention_bias": _biased(header, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _biased(header, "ffn_gate", "ffn_up", "ffn_down"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for name, key in (("bos", "bos"), ("pad", "padding")):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    ends = ending_ids(metadata)
    config["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    return config


def _rows(path: Path, header: Header, name: str, columns: int) -> int:
    """How many rows of `columns` values the matrix `name` holds."""
    info = header.tensors.get(name)
    if info is None:
        raise ModelError(f"{path}: tensor {name!r} is missing; the file is not a whole llama model.")
    if len(info.shape) != 2 or info.shape[1] != columns:
        raise ModelError(f"{path}: tensor {name!r} has the shape {info.shape}, not rows of {columns}.")
    return info.shape[0]


def _biased(header: Header, *stems: str) -> bool:
    biased = {name.split(".")[-2] for name in header.tensors if name.startswith("blk.") and name.endswith(".bias")}
    return not biased.isdisjoint(stems)


def _rope_scaling(llama: _Llama, factors: np.ndarray | None) -> dict | None:
    kind = llama.get("rope.scaling.type", str, "linear" if "llama.rope.scale_linear" in llama.metadata else "none")
    if kind not in ("none", "linear"):
        raise ModelError(
            f"{llama.path}: rope scaling {shorten(repr(kind))} is not supported (supported: linear, and Llama 3's)."
        )
    factor = llama.positive("rope.scaling.factor", llama.get("rope.scale_linear", float, 1.0))
    stretched = kind == "linear" and factor != 1.0
    if factors is None or np.all(factors == 1):
        return {"rope_type": "linear", "factor": factor} if stretched else None
    scaling = None if stretched else _llama3_scaling(llama, factors)
    if scaling is None:
        raise ModelError(
            f"{llama.path}: the values of rope_freqs.weight are not those of Llama 3's rope scaling with its published"
            " low and high frequency factors (1 and 4), and no other use of them is supported."
        )
    return scaling


def _llama3_scaling(llama: _Llama, factors: np.ndarray) -> dict | None:
    """The `rope_scaling` of Llama 3 that yields `factors`, by the formula of its release; None if none does."""
    base, width = llama.positive("rope.freq_base", 10000.0), 2 * factors.size
    factor = float(np.max(factors))
    original = llama.count("rope.scaling.original_context_length", 8192)
    low, high = 1.0, 4.0
    turns = original / (2 * np.pi * base ** (np.arange(0, width, 2) / width))
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
