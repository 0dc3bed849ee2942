"""Values that transformers 5 writes to config.json under keys that mlx-lm's architectures do not read.

`rope_parameters` took the place of `rope_theta`, `rope_scaling`, `partial_rotary_factor` and what single architectures
had besides, `layer_types` that of `sliding_window_pattern`, and `num_local_experts` that of `num_experts`. Most
architectures of mlx-lm read the older keys only and compute with their defaults where these are absent, without an
error.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.common.errors import ModelError

OLD_RUNS_MISREAD = (
    "The base model's config.json is in the format of transformers 5, of which earlier versions did not read all: what "
    "they trained on it needs the version that it was trained with."
)
_THETA = ("rope_theta", "rotary_emb_base")
_SLIDING_THETA = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
"""The base of the rotary embedding in layers with a sliding window, where it is another one."""
_ROTATED_SHARE = ("partial_rotary_factor", "rotary_pct")
_SCALE_FULL_ATTENTION_ONLY = ("gemma3_text", "gear", "olmo3")
"""Modules that apply `rope_scaling` in layers with full attention only."""
_READ_THETA_ONLY = ("exaone_moe", "granitemoehybrid", "lfm2", "lfm2_moe", "muse_glimmer", "olmo_hybrid")
"""Modules whose arguments have `rope_parameters`, of which they read nothing but `rope_theta`."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts. transformers 5 writes some architectures' under another one than before."""
_TEXT_ARGS = ("TextArgs", "TextConfig", "TextModelArgs")


class _UnreadableError(Exception):
    """Raised for a value that mlx-lm has no place for; says which."""


def carried_over(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the keys of `config`, a parsed config.json, that make mlx-lm read what transformers 5 wrote.

    They are empty where mlx-lm reads the same without them. `path` is `model.path`.

    Raises:
        ModelError: the architecture has no place for a value, or an older key contradicts it.
    """
    try:
        text = config.get("text_config")
        modules = _architecture_modules(config)
        if not modules:
            return {}
        if isinstance(text, dict):
            keys = _section_keys(text, _text_args(modules, text))
            return {"text_config": {**text, **keys}} if keys else {}
        return _section_keys(config, [modules[0].ModelArgs, *_text_args(modules, config)])
    except _UnreadableError as reason:
        raise ModelError(
            f"model.path={path} (model_type '{config.get('model_type')}') is not supported: its config.json has "
            f"{reason}."
        ) from None


def misread_by_stock(folder: Path) -> bool:
    """Return whether stock mlx-lm misses a part of the config.json in `folder`. Raises ModelError as `carried_over`."""
    from mlx_lm.utils import load_config

    return bool(carried_over(load_config(folder), str(folder)))


def carried_over_note(path: str) -> str:
    """Return the line for the log about a model with keys that were carried over."""
    return (
        f"the config.json of {path} is in the format of transformers 5, of which stock mlx-lm {version('mlx-lm')} "
        "misses a part (rope_parameters, layer_types): that part is read here; stock mlx-lm computes something "
        "else from this folder, but the same from a fused export"
    )


def _architecture_modules(config: Mapping[str, Any]) -> list[ModuleType]:
    """Return the module of mlx-lm that defines the architecture, and those that its model class inherits from.

    Code that comes with a model reads its own config; it has none.
    """
    from mlx_lm.utils import _get_classes

    if config.get("model_file") is not None:
        return []
    try:
        model_class, _ = _get_classes(dict(config))
    except (KeyError, ValueError, AttributeError):  # reported where the model is loaded
        return []
    modules = (sys.modules[cls.__module__] for cls in model_class.__mro__)
    return [
        module for module in modules if module.__name__.startswith("mlx_lm.models.") and hasattr(module, "ModelArgs")
    ]


def _text_args(modules: list[ModuleType], text: Mapping[str, Any]) -> list[type]:
    """Return the classes that may read the section of the language model: that of its model_type, else all."""
    from mlx_lm.utils import MODEL_REMAPPING

    if not any(field.name == "text_config" for field in fields(modules[0].ModelArgs)):
        return []
    for module in modules:
        imported = [value for value in vars(module).values() if isinstance(value, ModuleType)]
        imported = [other for other in imported if other.__name__.startswith("mlx_lm.models.")]
        name = MODEL_REMAPPING.get(str(text.get("model_type")), text.get("model_type"))
        named = [other.ModelArgs for other in imported if other.__name__ == f"mlx_lm.models.{name}"]
        found = named or [getattr(module, name) for name in _TEXT_ARGS if hasattr(module, name)]
        found = found or [other.ModelArgs for other in imported if hasattr(other, "ModelArgs")]
        if found:
            return found
    return []


def _section_keys(section: Mapping[str, Any], classes: list[type]) -> dict[str, Any]:
    """Return what is carried over within one section of config.json, which `classes` may read."""
    known = {field.name for cls in classes for field in fields(cls)}
    names = {cls.__module__.rpartition(".")[2] for cls in classes}
    keys: dict[str, Any] = {}
    reads_parameters = "rope_parameters" in known and not names & set(_READ_THETA_ONLY)
    parameters = section.get("rope_parameters")
    if classes and isinstance(parameters, dict) and parameters and not reads_parameters:
        keys |= _rope_keys(section, parameters, known, scales_full_only=bool(names & set(_SCALE_FULL_ATTENTION_ONLY)))
    if "sliding_window_pattern" in known and "layer_types" not in known:
        keys |= _pattern_keys(section, as_text="exaone4" in names)
    keys |= _expert_keys(section, known)
    read = [(_arguments(cls, section), _arguments(cls, {**section, **keys})) for cls in classes]
    return keys if any(without is None or without != complete for without, complete in read) else {}


def _rope_keys(
    section: Mapping[str, Any], parameters: dict[str, Any], known: set[str], *, scales_full_only: bool
) -> dict[str, Any]:
    full, sliding = _by_layer_type(parameters)
    keys: dict[str, Any] = {}

    def carry(names: tuple[str, ...], value: Any, key: str) -> None:
        name = next((name for name in names if name in known), None)
        if name is None:
            raise _UnreadableError(f"{key}={value} in rope_parameters, which mlx-lm does not read")
        present = section.get(name)
        if present is None:
            keys[name] = value
        elif present != value:
            raise _UnreadableError(f"{name}={present}, but {key}={value} in rope_parameters: remove the wrong one")

    if (theta := full.get("rope_theta")) is not None:
        carry(_THETA, theta, "rope_theta")
    local_theta = full.get("rope_theta") if sliding is None else sliding.get("rope_theta")
    if local_theta is not None and (local_theta != theta or any(name in known for name in _SLIDING_THETA)):
        carry(_SLIDING_THETA, local_theta, "sliding_attention.rope_theta")
    share = full.get("partial_rotary_factor")
    if share is not None and "rotary_dim" in known and not any(name in known for name in _ROTATED_SHARE):
        carry(("rotary_dim",), int(_head_dim(section) * share), "head_dim * partial_rotary_factor")
    elif share is not None and (share != 1 or any(name in known for name in _ROTATED_SHARE)):
        carry(_ROTATED_SHARE, share, "partial_rotary_factor")
    scaling = _scaling(full)
    local = scaling if sliding is None else _scaling(sliding)
    if local != (None if scales_full_only and sliding is not None else scaling):
        raise _UnreadableError("another rope_type for sliding_attention than mlx-lm computes")
    if "rope_scaling" not in known:
        if scaling is not None:
            raise _UnreadableError(f"rope_type={scaling['rope_type']} in rope_parameters, which mlx-lm does not read")
    elif not section.get("rope_scaling"):
        keys["rope_scaling"] = scaling
    original = full.get("original_max_position_embeddings")
    if original is not None and "original_max_position_embeddings" in known:
        carry(("original_max_position_embeddings",), original, "original_max_position_embeddings")
    return keys


def _by_layer_type(parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the parameters of layers with full attention, and those of layers with a sliding window if they differ."""
    by_type = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if not by_type:
        return parameters, None
    first, *others = by_type.values()
    if all(other == first for other in others):
        return first, None
    if by_type.keys() != {"full_attention", "sliding_attention"}:
        raise _UnreadableError(f"rope_parameters of {', '.join(by_type)} that differ, which mlx-lm does not read")
    return by_type["full_attention"], by_type["sliding_attention"]


def _head_dim(section: Mapping[str, Any]) -> int:
    head_dim: int = section.get("head_dim") or section["hidden_size"] // section["num_attention_heads"]
    return head_dim


def _scaling(parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling` as earlier versions of transformers wrote it; its type has had two names."""
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type == "default":
        return None
    left_out = {"rope_theta"} if rope_type == "proportional" else {"rope_theta", "partial_rotary_factor"}
    scaling = {key: value for key, value in parameters.items() if key not in left_out and value is not None}
    return {**scaling, "rope_type": rope_type, "type": rope_type}


def _pattern_keys(section: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Return `sliding_window_pattern` in place of `layer_types`: every so many layers, one has full attention.

    `as_text` gives the pattern of three sliding layers and a full one as LLLG instead of 4.
    """
    layer_types, present = section.get("layer_types"), section.get("sliding_window_pattern")
    expected = str if as_text else int
    if isinstance(present, expected) or not isinstance(layer_types, list) or not layer_types:
        return {}
    if as_text and "sliding_attention" not in layer_types:
        return {"sliding_window_pattern": None}
    full = [layer_type == "full_attention" for layer_type in layer_types]
    period = full.index(True) + 1 if any(full) else None
    if period is None or full != [(index + 1) % period == 0 for index in range(len(full))]:
        raise _UnreadableError("layer_types without a fixed period, which mlx-lm does not read")
    return {"sliding_window_pattern": "L" * (period - 1) + "G" if as_text else period}


def _expert_keys(section: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Return the number of experts under the name that mlx-lm reads."""
    names = [name for name in _EXPERTS if name in known]
    numbers = [section[name] for name in _EXPERTS if section.get(name) is not None]
    if not names or not numbers or any(section.get(name) is not None for name in names):
        return {}
    return dict.fromkeys(names, numbers[0])


def _arguments(cls: Any, section: Mapping[str, Any]) -> Any:
    """Return the arguments that mlx-lm reads from `section`, or None if it refuses it."""
    try:
        return cls.from_dict(copy.deepcopy(dict(section)))
    except Exception:  # each architecture raises what it likes; loading the model reports it
        return None
