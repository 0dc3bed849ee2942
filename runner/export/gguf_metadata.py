"""The metadata of a GGUF file for a model of mlx-lm: the inverse of `runner.models.gguf.config`.

Keys and what is left out follow llama.cpp's converter, for the families of `runner.models.gguf.families`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from runner.common.errors import ModelError
from runner.models.gguf.families import FAMILIES, MIXTRAL, Family
from runner.models.gguf.header import Value
from runner.models.gguf.rope import FREQUENCIES, LONG, SHORT
from runner.models.load import BaseModel

_ARCHITECTURES = {family.model_type: name for name, family in FAMILIES.items()} | {
    "mistral": "llama",
    MIXTRAL.model_type: "llama",
}
_SCALED_LAYERS = {"gemma2": 46, "gemma3": 62}
"""The number of blocks by which llama.cpp knows the 27B models, which scale their queries in another way."""


class ModelSettings:
    """The settings of a model of mlx-lm: its arguments with their defaults, else what config.json says."""

    def __init__(self, base: BaseModel) -> None:
        self._args, self._config = getattr(base.model, "args", None), base.config
        self.model_type = str(base.config.get("model_type"))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, or `default` where it is absent or null."""
        value = getattr(self._args, name, None)
        value = self._config.get(name) if value is None else value
        return default if value is None else value

    def require(self, name: str) -> Any:
        """Return a setting that has to be there. Raises ModelError."""
        value = self.get(name)
        if value is None:
            raise ModelError(f"The model's config has no {name}, which a GGUF file needs.")
        return value


def find_architecture(base: BaseModel) -> tuple[str, Family]:
    """Return `general.architecture` and the family. Raises ModelError for a model that is of none."""
    model_type = base.config.get("model_type")
    architecture = _ARCHITECTURES.get(str(model_type))
    if architecture is None:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ModelError(
            f"model_type '{model_type}' cannot be exported as GGUF (these can: {known}). For mlx-lm: --to fused."
        )
    return architecture, MIXTRAL if model_type == MIXTRAL.model_type else FAMILIES[architecture]


def model_metadata(base: BaseModel, architecture: str) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """Return the metadata of the architecture, and the tensors of RoPE factors by name.

    Raises:
        ModelError: a setting has no place in the file, or llama.cpp would not read it.
    """
    settings = ModelSettings(base)
    hidden, heads = settings.require("hidden_size"), settings.require("num_attention_heads")
    head_dim = settings.get("head_dim", hidden // heads)
    rotated = int(head_dim * settings.get("partial_rotary_factor", 1.0)) if architecture == "phi3" else head_dim
    values: dict[str, Value] = {
        "context_length": settings.require("max_position_embeddings"),
        "embedding_length": hidden,
        "block_count": settings.require("num_hidden_layers"),
        "feed_forward_length": settings.require("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": settings.get("num_key_value_heads", heads),
        "attention.layer_norm_rms_epsilon": float(settings.require("rms_norm_eps")),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(settings.get("rope_theta", 10000.0)),
        "rope.dimension_count": rotated,
        "vocab_size": settings.require("vocab_size"),
    }
    if settings.get("rope_traditional", False):
        raise ModelError("The model rotates interleaved pairs (rope_traditional), which is not supported as GGUF.")
    scaling, factors = _rope(settings, rotated)
    values |= scaling | _experts(settings, architecture) | _gemma(settings, architecture, hidden, heads, head_dim)
    if architecture == "phi3":
        values["attention.sliding_window"] = settings.get("sliding_window", 0)
        values["rope.scaling.original_context_length"] = settings.get(
            "original_max_position_embeddings", values["context_length"]
        )
    return {f"{architecture}.{key}": value for key, value in values.items()}, factors


def _experts(settings: ModelSettings, architecture: str) -> dict[str, Value]:
    count = settings.get("num_local_experts" if settings.model_type == "mixtral" else "num_experts", 0)
    if architecture not in ("qwen2moe", "qwen3moe") and settings.model_type != "mixtral":
        return {}
    values: dict[str, Value] = {"expert_count": count, "expert_used_count": settings.require("num_experts_per_tok")}
    if architecture in ("qwen2moe", "qwen3moe"):
        if bool(settings.get("norm_topk_prob", False)) != (architecture == "qwen3moe"):
            raise ModelError(f"norm_topk_prob={settings.get('norm_topk_prob')}: llama.cpp computes the other.")
        values["expert_feed_forward_length"] = settings.require("moe_intermediate_size")
    if architecture == "qwen2moe":
        values["expert_shared_feed_forward_length"] = settings.require("shared_expert_intermediate_size")
    return values


def _gemma(settings: ModelSettings, architecture: str, hidden: int, heads: int, head_dim: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    if layers := _SCALED_LAYERS.get(architecture):
        expected = hidden / heads if settings.require("num_hidden_layers") == layers else head_dim
        scalar = settings.get("query_pre_attn_scalar", head_dim)
        if not math.isclose(scalar, expected, rel_tol=1e-6):
            raise ModelError(
                f"query_pre_attn_scalar={scalar}: llama.cpp scales the queries of this architecture by {expected:g}."
            )
    if architecture == "gemma2":
        values["attn_logit_softcapping"] = float(settings.get("attn_logit_softcapping", 50.0))
        values["final_logit_softcapping"] = float(settings.get("final_logit_softcapping", 30.0))
        values["attention.sliding_window"] = settings.get("sliding_window", 4096)
    if architecture == "gemma3":
        pattern = settings.get("sliding_window_pattern", 6)
        if pattern != 1:
            values["attention.sliding_window"] = settings.require("sliding_window")
            values |= {"attention.sliding_window_pattern": pattern} if pattern != 6 else {}
        local = float(settings.get("rope_local_base_freq", 10000.0))
        values |= {"rope.freq_base_swa": local} if local != 10000.0 else {}
    return values


def _rope(settings: ModelSettings, rotated: int) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """Return the metadata of RoPE scaling, and its tensors."""
    scaling = settings.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", None):
        return {}, {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}, {}
    if kind == "yarn":
        values: dict[str, Value] = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        }
        for name in ("beta_fast", "beta_slow"):
            values |= {f"rope.scaling.yarn_{name}": float(scaling[name])} if name in scaling else {}
        return values, {}
    if kind == "llama3":
        return {}, {FREQUENCIES: _llama3_factors(scaling, float(settings.get("rope_theta", 10000.0)), rotated)}
    if kind in ("longrope", "su") and settings.model_type == "phi3":
        return _longrope(settings, scaling)
    raise ModelError(f"RoPE scaling '{kind}' of this model is not supported as GGUF.")


def _llama3_factors(scaling: Mapping[str, Any], base: float, rotated: int) -> np.ndarray:
    """Return the divisors of the frequencies, by the formula of Llama 3.1's release (`apply_scaling` in model.py)."""
    low, high, original = (
        float(scaling[name]) for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    turns = original / (2 * np.pi * base ** (np.arange(0, rotated, 2) / rotated))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / float(scaling["factor"]) + smooth)).astype(np.float32)


def _longrope(settings: ModelSettings, scaling: Mapping[str, Any]) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    original = settings.require("original_max_position_embeddings")
    ratio = settings.require("max_position_embeddings") / original
    factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    tensors = {
        LONG: np.array(scaling["long_factor"], np.float32),
        SHORT: np.array(scaling.get("short_factor") or scaling["long_factor"], np.float32),
    }
    return {"rope.scaling.attn_factor": factor}, tensors
