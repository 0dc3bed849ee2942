"""Quantized layers of every mode that MLX knows: finding them, expanding them one at a time, and their config.

Expanded weights are what a quantized product with activations of the target dtype multiplies by: MLX casts the scales
and biases to the activations' dtype before it applies them, so they are cast before the weights are computed here too.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from runner.common.errors import ModelError

_CONFIG_KEYS = ("quantization", "quantization_config")


def is_quantized(model: nn.Module) -> bool:
    """Return whether any layer of `model` is quantized."""
    return any(_is_quantized_layer(module) for module in model.modules())


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the quantized layers of `model` by their dotted path."""
    return {name: module for name, module in model.named_modules() if _is_quantized_layer(module)}


def needs_gpu(model: nn.Module) -> bool:
    """Return whether MLX computes products with a layer of `model` on a GPU only: those with a global scale."""
    return any(layer.get("global_scale") is not None for layer in quantized_layers(model).values())


def expand_layers(model: nn.Module, dtype: mx.Dtype | None, *, evaluate: bool = True) -> list[str]:
    """Replace each quantized layer of `model` by an unquantized one, and return the paths of those that cannot be.

    Each layer is computed and its quantized weights are freed before the next one, so the peak is the model and one
    layer. `dtype` is that of the expanded weights; None selects the one that the model's other parameters have. Without
    `evaluate` nothing is computed yet.
    """
    dtype, remaining = dtype or prevailing_dtype(model), []
    for name in list(quantized_layers(model)):
        expanded = expanded_layer(module_at(model, name), dtype)
        if expanded is None:
            remaining.append(name)
            continue
        if evaluate:
            mx.eval(expanded.parameters())
        replace_module(model, name, expanded)
    return remaining


def expanded_layer(layer: nn.Module, dtype: mx.Dtype) -> nn.Module | None:
    """Return the unquantized layer that computes what the quantized `layer` does, or None if its kind is not known."""
    cls = _expanded_class(layer)
    return None if cls is None else _new_layer(cls, layer, expand_weight(layer, dtype))


def expand_weight(layer: nn.Module, dtype: mx.Dtype) -> mx.array:
    """Return the weight of a quantized layer in `dtype`, computed in float32 where there is a global scale."""
    scales, biases = layer.scales, layer.get("biases")
    options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    if layer.mode == "affine":
        return mx.dequantize(layer.weight, scales.astype(dtype), biases.astype(dtype), **options)
    global_scale = layer.get("global_scale")
    if global_scale is None:
        return mx.dequantize(layer.weight, scales, dtype=dtype, **options)
    experts = [
        mx.dequantize(layer.weight[i], scales[i], global_scale=global_scale[i], dtype=mx.float32, **options)
        for i in range(layer.weight.shape[0])
    ]
    return mx.stack(experts).astype(dtype)


def quantize_like(layer: nn.Module, weight: mx.array) -> nn.Module:
    """Return a copy of the quantized `layer` that holds `weight`, quantized by the same mode, bits and group size."""
    affine = layer.mode == "affine"
    options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    cls: type[nn.Module] = type(layer)
    copy: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]  # without its random weights
    copy.__dict__.update(layer.__dict__)
    dict.update(copy, layer)
    if layer.get("global_scale") is not None:
        from mlx_lm.models.switch_layers import _quantize_experts

        copy.weight, copy.scales, copy.global_scale = _quantize_experts(weight.astype(mx.float32), **options)
    else:
        # As the layer was quantized: affine scales have the dtype of the weights.
        source = weight.astype(layer.scales.dtype if affine else mx.float32)
        copy.weight, copy.scales, *biases = mx.quantize(source, **options)
        if affine:
            copy.biases = biases[0]
    return copy


def module_at(model: nn.Module, name: str) -> Any:
    """Return the module or list at this dotted path."""
    node: Any = model
    for part in name.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at this dotted path of `model`."""
    path, _, key = name.rpartition(".")
    parent = module_at(model, path) if path else model
    parent[int(key) if isinstance(parent, list) else key] = module


def remove_from_config(config: dict[str, Any]) -> None:
    """Remove what tells mlx-lm that the weights are quantized from a model's config."""
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            for key in _CONFIG_KEYS:
                section.pop(key, None)


def refuse_quantized_activations(config: dict[str, Any], path: str) -> None:
    """Refuse a model whose layers quantize their inputs, too.

    Raises:
        ModelError: config.json sets quantize_activations.
    """
    if config.get("quantize_activations"):
        raise ModelError(
            f"model.path={path}: its config.json sets quantize_activations, and an adapter cannot be trained through "
            "quantized activations. Remove that key from config.json: the weights stay quantized."
        )


def _is_quantized_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear))


def _expanded_class(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class of the unquantized layer, or None for a layer of an architecture's own that is not known."""
    from mlx_lm.models.afm7 import FusedLinear, FusedQuantizedLinear

    return {
        nn.QuantizedLinear: nn.Linear,
        nn.QuantizedEmbedding: nn.Embedding,
        QuantizedSwitchLinear: SwitchLinear,
        QuantizedMultiLinear: MultiLinear,
        FusedQuantizedLinear: FusedLinear,
    }.get(type(layer))


def _new_layer(cls: type[nn.Module], layer: nn.Module, weight: mx.array) -> nn.Module:
    """Return a layer of class `cls` with `weight` and with the bias and the plain attributes of `layer`.

    The constructors of the classes draw random weights first, which takes time and memory.
    """
    new: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]
    nn.Module.__init__(new)
    new.weight = weight
    if "bias" in layer:
        new.bias = layer.bias
    for name in ("indices", "num_embeddings", "dims"):  # of afm7's fused layers; of quantized embeddings
        if hasattr(layer, name):
            setattr(new, name, getattr(layer, name))
    new.freeze()
    new.train(layer.training)
    return new


def prevailing_dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype of most floating-point elements outside quantized weights."""
    counts: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            counts[array.dtype] = counts.get(array.dtype, 0) + array.size
    return max(counts, key=lambda dtype: counts[dtype], default=mx.float32)
