"""Convert a GGUF header into a config in the format of the hub's config.json.

Every setting that would change what the model computes and that mlx-lm's model class cannot express is refused by name:
an error is better than a silently different model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.errors import ModelError, shorten
from runner.models.gguf.families import FAMILIES, IGNORED_KEYS, NEUTRAL_VALUES, Family, ModelShape, find_family
from runner.models.gguf.header import Header, Value
from runner.models.gguf.metadata import ArchitectureMetadata
from runner.models.gguf.rope import rope_scaling
from runner.models.gguf.tokenizer import stop_token_ids


def model_config(
    path: Path, header: Header, rope_factors: Mapping[str, np.ndarray]
) -> tuple[Family, dict[str, Any], list[str]]:
    """Return the family and the config of the model in `header`, and lines for the log; errors name the file `path`.

    `rope_factors`: the values of the file's tensors of RoPE factors, by name.

    Raises:
        ModelError: the architecture is not supported, a value is missing, of the wrong type or out of range, or a
            setting has no counterpart in mlx-lm's model class. Names the file and the key.
    """
    metadata = _require_supported_file(path, header.metadata)
    family, notes = find_family(metadata), list[str]()
    shape = _read_shape(metadata, header, family)
    settings = family.settings(metadata, shape, notes)
    metadata.require_neutral({k: v for k, v in NEUTRAL_VALUES.items() if f"{metadata.prefix}.{k}" not in metadata.used})
    rotated = metadata.count("rope.dimension_count", shape.head_dim)
    is_partial = family.rotates_part and rotated < shape.head_dim
    if rotated % 2 or (rotated != shape.head_dim and not is_partial):
        raise ModelError(
            f"{path}: '{metadata.prefix}.rope.dimension_count' is {rotated}, but a head has {shape.head_dim}."
        )
    stop_ids = stop_token_ids(header.metadata)
    config = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": metadata.positive("attention.layer_norm_rms_epsilon"),
        "vocab_size": _rows(path, header, "token_embd.weight", shape.hidden),
        "max_position_embeddings": shape.context,
        "rope_theta": metadata.positive("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(metadata, rope_factors, rotated, family.rope_scalings),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": stop_ids if len(stop_ids) > 1 else next(iter(stop_ids), None),
    }
    biased = {name.split(".")[-2] for name in header.tensors if name.startswith("blk.") and name.endswith(".bias")}
    config |= {flag: not biased.isdisjoint(stems) for flag, stems in family.bias_flags.items()}
    config |= _read_widths(metadata, header, family, shape, settings)
    unknown = sorted(
        key
        for key in header.metadata
        if key.startswith(f"{metadata.prefix}.")
        and key not in metadata.used
        and key.removeprefix(f"{metadata.prefix}.") not in IGNORED_KEYS
    )
    if unknown:
        notes.append(f"unknown metadata was ignored: {shorten(', '.join(unknown), 200)}")
    return family, config | settings, notes


def _require_supported_file(path: Path, metadata: dict[str, Value]) -> ArchitectureMetadata:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ModelError(
            f"{path}: its architecture is {shorten(repr(architecture))}, which is not supported as GGUF (supported:"
            f" {', '.join(FAMILIES)}). Use the safetensors of the same model: its Hugging Face folder or hub id."
        )
    if str(metadata.get("split.count", 1)) not in ("0", "1"):
        raise ModelError(f"{path}: it is one part of a split model; merge the parts first (gguf-split --merge).")
    return ArchitectureMetadata(path, metadata, architecture)


def _read_shape(metadata: ArchitectureMetadata, header: Header, family: Family) -> ModelShape:
    path, prefix = metadata.path, metadata.prefix
    layers = metadata.count("block_count")
    if layers > len(header.tensors):
        raise ModelError(f"{path}: {layers} blocks, but only {len(header.tensors)} tensors.")
    hidden, heads = metadata.count("embedding_length"), metadata.count("attention.head_count")
    head_dim = metadata.count("attention.key_length", max(hidden // heads, 1))
    value_dim = metadata.count("attention.value_length", head_dim)
    if value_dim != head_dim or head_dim % 2:
        raise ModelError(f"{path}: '{prefix}.attention.value_length' is {value_dim}, but a head has {head_dim}.")
    kv_heads = metadata.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelError(f"{path}: {heads} heads cannot share {kv_heads} key and value heads.")
    if family.computes_head_dim and heads * head_dim != hidden:
        raise ModelError(f"{path}: {heads} heads of {head_dim} do not fit the hidden size {hidden}.")
    return ModelShape(layers, hidden, heads, kv_heads, head_dim, metadata.count("context_length"))


def _read_widths(
    metadata: ArchitectureMetadata, header: Header, family: Family, shape: ModelShape, settings: Mapping[str, Any]
) -> dict[str, int]:
    """Return the widths of the feed-forward layers, and check the sizes that the model is built with.

    Only the first block is checked here, so that the model that is built is no larger than the file; all other
    tensors are compared with the model.
    """
    path, hidden = metadata.path, shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = {"attn_q": queries, "attn_k": keys, "attn_v": keys, "attn_qkv": queries + 2 * keys}
    widths: dict[str, int] = {}
    if "ffn_gate_exps" in family.modules:
        experts = int(settings.get("num_experts") or settings["num_local_experts"])
        width = _rows(path, header, "blk.0.ffn_gate_exps.weight", hidden, experts)
        widths["intermediate_size"] = width
        if family.model_type != "mixtral":
            widths = {"intermediate_size": metadata.count("feed_forward_length", width), "moe_intermediate_size": width}
        if "ffn_gate_shexp" in family.modules:
            widths["shared_expert_intermediate_size"] = _rows(path, header, "blk.0.ffn_gate_shexp.weight", hidden)
    else:
        widths["intermediate_size"] = metadata.count("feed_forward_length")
        is_fused = "ffn_gate" not in family.modules
        rows |= {"ffn_gate": widths["intermediate_size"]}
        rows |= {"ffn_up": widths["intermediate_size"] * (2 if is_fused else 1)}
    stems = [stem for stem in rows if stem in family.modules]
    expected = tuple(rows[stem] for stem in stems)
    actual = tuple(_rows(path, header, f"blk.0.{stem}.weight", hidden) for stem in stems)
    if expected != actual:
        raise ModelError(
            f"{path}: the rows of {', '.join(stems)} should be {expected} by its metadata, but are {actual}."
        )
    return widths


def _rows(path: Path, header: Header, name: str, columns: int, experts: int | None = None) -> int:
    """Return the number of rows of the matrix `name`, which must have `columns` columns; of each expert's, if given."""
    info = header.tensors.get(name)
    if info is None:
        hint = ""
        if experts is not None and name.replace("_exps", ".0") in header.tensors:
            hint = " It holds each expert apart, as early converters wrote them: convert the model again."
        raise ModelError(f"{path}: tensor {name!r} is missing; the file is not a complete model.{hint}")
    outer = () if experts is None else (experts,)
    if len(info.shape) != len(outer) + 2 or info.shape[:-2] != outer or info.shape[-1] != columns:
        expected = ", ".join(map(str, (*outer, "rows", columns)))
        raise ModelError(f"{path}: tensor {name!r} has the shape {info.shape}, not ({expected}).")
    return info.shape[-2]
