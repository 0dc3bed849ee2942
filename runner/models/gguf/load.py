"""Load a GGUF file as mlx-lm's own model, config and tokenizer.

The file is only opened for reading and its tensors are decoded in this package: `mlx.core.load` opens GGUF files for
writing, so it fails on read-only ones, and it silently converts tensor types that it cannot keep.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.common.errors import ModelError
from runner.models.gguf import tokenizer as gguf_tokenizer
from runner.models.gguf.blocks import AFFINE_TYPES, GROUP_SIZE, QuantizedMatrix, read_tensor
from runner.models.gguf.config import model_config
from runner.models.gguf.families import Family
from runner.models.gguf.header import Header, read_header
from runner.models.gguf.rope import FACTOR_TENSORS, read_rope_factors

_TOP_LEVEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PLAIN_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model read from a GGUF file.

    `config` has the format of the hub's config.json: with it, `mlx_lm.utils.save_model`, `save_config` and
    `tokenizer.save_pretrained` write a folder that mlx-lm loads.
    """

    model: nn.Module
    config: dict[str, Any]
    tokenizer: TokenizerWrapper
    notes: list[str] = field(default_factory=list)
    """Lines for the log."""


def load_gguf(path: Path, *, keep_quantized: bool, dtype: mx.Dtype | None) -> GgufModel:
    """Load the model in the GGUF file `path`.

    `keep_quantized` keeps Q4_0, Q4_1, Q8_0, Q4_K and Q5_K matrices quantized (4, 5 or 8 bits, groups of 32) instead of
    dequantizing them; MLX has no counterpart of the other block types, which are always expanded. `dtype` is that of
    all other parameters and of the scales; None selects the one in which most of the file is stored (bfloat16 instead
    of float16 for Gemma, which exceeds its range).

    Raises:
        ModelError: the file is damaged or hostile, its architecture, tensor types, tokenizer or RoPE scaling are not
            supported, or tensors are missing, unknown or misshapen.
    """
    header = read_header(path)
    family, config, notes = model_config(path, header, read_rope_factors(path, header))
    names = _parameter_names(path, header, family, config)
    tokenizer = gguf_tokenizer.build_tokenizer(header.metadata, path)
    if len(tokenizer) > config["vocab_size"]:
        raise ModelError(f"{path}: {len(tokenizer)} tokens, but embeddings for {config['vocab_size']}.")
    tokenizer.model_max_length = config["max_position_embeddings"]
    dtype = dtype or _default_dtype(header, family)
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")

    bits: dict[str, int] = {}
    model = _build_model(family, config, names)
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    weights: dict[str, mx.array] = {}
    for source, target in names.items():
        info = header.tensors[source]
        if target not in shapes:
            raise ModelError(f"{path}: tensor {source!r} is not part of a {family.model_type} model as supported here.")
        if info.shape != shapes[target] and (1, *info.shape) != shapes[target]:
            raise ModelError(f"{path}: tensor {source!r} has the shape {info.shape}, not {shapes[target]}.")
        tensor = read_tensor(path, info, keep_quantized=keep_quantized)
        if family.interleaves_rows and (order := _row_order(target, config)) is not None:
            tensor = tensor[order]
        if keep_quantized and isinstance(tensor, QuantizedMatrix):
            layer = target.removesuffix(".weight")
            bits[layer] = tensor.bits
            parameters = {
                target: mx.array(tensor.pack()),
                f"{layer}.scales": mx.array(tensor.scales).astype(dtype),
                f"{layer}.biases": mx.array(tensor.biases).astype(dtype),
            }
        else:
            values = tensor.dequantize() if isinstance(tensor, QuantizedMatrix) else np.ascontiguousarray(tensor)
            if family.norm_offset and target.endswith("norm.weight"):
                values = values.astype(np.float32) - np.float32(family.norm_offset)
            parameters = {target: mx.array(values.reshape(shapes[target])).astype(dtype)}
        mx.eval(parameters)  # one tensor at a time, so that the peak is the model and one tensor of the file
        weights |= parameters
    for name in sorted(shapes.keys() - weights.keys() - {f"{layer}.weight" for layer in bits}):
        _require_optional_bias(path, family, name)
        weights[name] = mx.zeros(shapes[name], dtype)
    if bits:
        config["quantization"] = _quantization_config(bits)
        nn.quantize(model, class_predicate=lambda name, _: _layer_config(bits[name]) if name in bits else False)
    if keep_quantized:
        notes += _expansion_notes(header, config["torch_dtype"])
    model.eval()
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return GgufModel(model, config, gguf_tokenizer.wrap_tokenizer(tokenizer, header.metadata), notes)


def gguf_shapes(
    path: Path, *, keep_quantized: bool, dtype: mx.Dtype | None
) -> tuple[nn.Module, dict[str, Any], mx.Dtype]:
    """Return the model that `load_gguf` would, with parameters that are not computed, its config and its dtype.

    Raises:
        ModelError: as `load_gguf`, where the header shows it.
    """
    header = read_header(path)
    family, config, _ = model_config(path, header, read_rope_factors(path, header))
    names = _parameter_names(path, header, family, config)
    model = _build_model(family, config, names)
    if keep_quantized:
        types = {target.removesuffix(".weight"): header.tensors[source].type_name for source, target in names.items()}
        bits = {layer: int(name[1]) for layer, name in types.items() if name in AFFINE_TYPES}
        nn.quantize(model, class_predicate=lambda name, _: _layer_config(bits[name]) if name in bits else False)
    return model, config, dtype or _default_dtype(header, family)


def _build_model(family: Family, config: dict[str, Any], names: Mapping[str, str]) -> nn.Module:
    """Return the model with parameters that are not computed yet; one whose class ties embeddings in `sanitize` too."""
    module = importlib.import_module(f"mlx_lm.models.{family.model_type}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if hasattr(model, "sanitize"):
        model.sanitize(dict.fromkeys(names.values()))
    return model


def _parameter_names(path: Path, header: Header, family: Family, config: dict[str, Any]) -> dict[str, str]:
    """Return mlx-lm's parameter name for each tensor, checked to be all weights of the model and nothing unknown."""
    layers = range(config["num_hidden_layers"])
    modules = {f"blk.{i}.{stem}": f"model.layers.{i}.{name}" for i in layers for stem, name in family.modules.items()}
    modules |= _TOP_LEVEL_NAMES
    if config["tie_word_embeddings"]:
        del modules["output"]
    names = {}
    for source in header.tensors.keys() - FACTOR_TENSORS:
        stem, _, part = source.rpartition(".")
        is_bias = part == "bias" and modules.get(stem, "").endswith("_proj")
        if stem not in modules or not (part == "weight" or is_bias):
            raise ModelError(
                f"{path}: tensor {source[:80]!r} is not part of a {family.model_type} model as supported here."
            )
        names[source] = f"{modules[stem]}.{part}"
    for stem in modules:
        if f"{stem}.weight" not in names:
            raise ModelError(f"{path}: tensor '{stem}.weight' is missing; the file is not a complete model.")
    return dict(sorted(names.items()))


def _require_optional_bias(path: Path, family: Family, parameter: str) -> None:
    """Refuse the absence of a parameter, unless it is a bias that a setting of the config adds to several layers."""
    if not (parameter.endswith(".bias") and family.bias_flags):
        raise ModelError(f"{path}: the file has no tensor for {parameter}; it is not a complete model.")


def _expansion_notes(header: Header, dtype: str) -> list[str]:
    types = sorted({info.type_name for info in header.tensors.values()} - {*AFFINE_TYPES, *_PLAIN_TYPES})
    if not types:
        return []
    return [
        f"{', '.join(types)} have no counterpart in MLX: these weights are expanded to {dtype}; with"
        " model.dequantize=always, model.quantize.bits quantizes the whole model again"
    ]


def _row_order(parameter: str, config: dict[str, Any]) -> np.ndarray | None:
    """Return the row indices that undo llama.cpp's permutation of q and k, or None for other parameters.

    llama.cpp interleaves the halves that the rotary embedding pairs: within each head the file holds
    (head_dim / 2, 2) rows where the hub's layout has (2, head_dim / 2).
    """
    for module, heads_key in ((".q_proj.", "num_attention_heads"), (".k_proj.", "num_key_value_heads")):
        if module in parameter:
            heads, head_dim = config[heads_key], config["head_dim"]
            return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return None


def _default_dtype(header: Header, family: Family) -> mx.Dtype:
    stored_bytes: Counter[str] = Counter()
    for info in header.tensors.values():
        stored_bytes[info.type_name] += info.nbytes
    prevailing = max(stored_bytes, key=stored_bytes.__getitem__)
    if prevailing == "F32":
        return mx.float32
    return mx.bfloat16 if prevailing == "BF16" or family.overflows_float16 else mx.float16


def _layer_config(bits: int) -> dict[str, Any]:
    return {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}


def _quantization_config(bits: dict[str, int]) -> dict[str, Any]:
    """Return mlx-lm's "quantization" entry: the settings of most layers, then each layer that differs."""
    counts = list(bits.values())
    prevailing = max(sorted(set(counts)), key=counts.count)
    exceptions = {layer: _layer_config(n) for layer, n in sorted(bits.items()) if n != prevailing}
    return _layer_config(prevailing) | exceptions
