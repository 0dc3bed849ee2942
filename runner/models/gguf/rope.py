"""Convert the RoPE scaling of a GGUF file into the `rope_scaling` of the hub's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.errors import ModelError, shorten
from runner.models.gguf.blocks import read_tensor
from runner.models.gguf.header import Header
from runner.models.gguf.metadata import ArchitectureMetadata

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = frozenset({FREQUENCIES, LONG, SHORT})
"""Tensors that hold divisors of the rotary frequencies and are no parameters of the model."""

# Settings of YaRN that the hub's configs leave at these values. llama.cpp reads an ext_factor of -1 as unset.
_YARN_NEUTRAL = {"yarn_ext_factor": (1.0, -1.0), "yarn_attn_factor": (1.0,), "yarn_log_multiplier": (0.0,)}


def read_rope_factors(path: Path, header: Header) -> dict[str, np.ndarray]:
    """Return the divisors of the rotary frequencies by tensor name: float32 (rotated dimensions / 2,) each."""
    factors = {}
    for name in sorted(FACTOR_TENSORS & header.tensors.keys()):
        info = header.tensors[name]
        if info.type_name != "F32" or len(info.shape) != 1:
            raise ModelError(f"{path}: {name} is {info.type_name} of shape {info.shape}, not a list of F32.")
        factors[name] = np.asarray(read_tensor(path, info))
    return factors


def rope_scaling(
    metadata: ArchitectureMetadata, factors: Mapping[str, np.ndarray], dimensions: int, supported: frozenset[str]
) -> dict[str, Any] | None:
    """Return the `rope_scaling` of a model that rotates `dimensions` of each head, or None if it has none.

    `supported`: the kinds that the model class of mlx-lm computes, of "linear", "yarn", "llama3" and "longrope".

    Raises:
        ModelError: the scaling is not supported, or its factors do not fit.
    """
    for name, values in factors.items():
        if values.size != dimensions // 2:
            raise ModelError(f"{metadata.path}: {name} has {values.size} values, a head needs {dimensions // 2}.")
    scaling = _convert(metadata, factors)
    if scaling is not None and scaling["rope_type"] not in supported:
        raise ModelError(
            f"{metadata.path}: RoPE scaling {scaling['rope_type']!r} is not supported for the architecture"
            f" {metadata.prefix!r} (supported: {', '.join(sorted(supported)) or 'none'}). Use the safetensors of the"
            " same model."
        )
    return scaling


def _convert(metadata: ArchitectureMetadata, factors: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    kind = metadata.require("rope.scaling.type", str, "linear" if "rope.scale_linear" in metadata else "none")
    if LONG in factors or SHORT in factors:
        return _longrope(metadata, factors, kind)
    frequencies = factors.get(FREQUENCIES)
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(
            f"{metadata.path}: RoPE scaling {shorten(repr(kind))} is not supported (supported: linear, yarn, Phi-3's"
            " and Llama 3's)."
        )
    if kind != "yarn":
        _require_attention_factor(metadata, 1.0)
    factor = metadata.positive("rope.scaling.factor", metadata.require("rope.scale_linear", float, 1.0))
    is_scaled = kind != "none" and factor != 1.0
    if frequencies is None or np.all(frequencies == 1):
        if not is_scaled:
            return None
        return {"rope_type": "linear", "factor": factor} if kind == "linear" else _yarn(metadata, factor)
    scaling = None if is_scaled else _llama3(metadata, frequencies)
    if scaling is None:
        raise ModelError(
            f"{metadata.path}: the values of rope_freqs.weight are not those of Llama 3's RoPE scaling with its"
            " published low and high frequency factors (1 and 4), the only ones supported."
        )
    return scaling


def _yarn(metadata: ArchitectureMetadata, factor: float) -> dict[str, Any]:
    """Return YaRN's scaling; the hub's default attention factor of 0.1 ln(factor) + 1 is what mlx-lm computes."""
    for key, neutral in _YARN_NEUTRAL.items():
        value = metadata.get(f"rope.scaling.{key}", float, neutral[0])
        if value not in neutral:
            raise ModelError(
                f"{metadata.path}: '{metadata.prefix}.rope.scaling.{key}' is {value}, which is not supported."
            )
    _require_attention_factor(metadata, 1.0)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.count("rope.scaling.original_context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in metadata:
            scaling[name] = metadata.positive(f"rope.scaling.yarn_{name}")
    return scaling


def _llama3(metadata: ArchitectureMetadata, factors: np.ndarray) -> dict[str, Any] | None:
    """Return the `rope_scaling` of Llama 3.1 that yields `factors`, or None if none does.

    The formula is that of Llama 3.1's release (`apply_scaling` in its model.py).
    """
    base, head_dim = metadata.positive("rope.freq_base", 10000.0), 2 * factors.size
    factor = float(np.max(factors))
    original = metadata.count("rope.scaling.original_context_length", 8192)
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


def _longrope(metadata: ArchitectureMetadata, factors: Mapping[str, np.ndarray], kind: str) -> dict[str, Any]:
    """Return Phi-3's scaling for long contexts, whose attention factor follows from the two context lengths."""
    if kind not in ("none", "longrope") or not {LONG, SHORT} <= factors.keys() or FREQUENCIES in factors:
        tensors = " and ".join(sorted(factors))
        raise ModelError(f"{metadata.path}: RoPE scaling {shorten(repr(kind))} with {tensors} is not supported.")
    original = metadata.count("rope.scaling.original_context_length")
    ratio = metadata.count("context_length") / original
    _require_attention_factor(metadata, math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0)
    metadata.get("rope.scaling.factor", float)
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "original_max_position_embeddings": original,
        "long_factor": [float(value) for value in factors[LONG]],
        "short_factor": [float(value) for value in factors[SHORT]],
    }


def _require_attention_factor(metadata: ArchitectureMetadata, expected: float) -> None:
    value = metadata.require("rope.scaling.attn_factor", float, expected)
    if not math.isclose(value, expected, rel_tol=1e-4):
        raise ModelError(
            f"{metadata.path}: '{metadata.prefix}.rope.scaling.attn_factor' is {value}, which is not supported: mlx-lm"
            f" computes {expected:.6g}."
        )
