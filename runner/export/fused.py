"""Merge an adapter into the weights of its base model."""

from __future__ import annotations

import copy
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from runner.common.errors import ModelError
from runner.common.text import first_line
from runner.models import quantization
from runner.models.load import DTYPES, BaseModel, remove_quantization
from runner.models.lora import AdaptedModel


def fuse_adapter(adapted: AdaptedModel, *, dequantize: bool) -> BaseModel:
    """Add the adapter's update to the base model's weights and return the base model; `adapted` is used up.

    A quantized layer with an adapter is dequantized, updated and quantized again as before, which rounds the update.
    With `dequantize` the whole model is dequantized instead and nothing is rounded. Layers are replaced one at a time.

    Raises:
        ModelError: a layer cannot be merged.
    """
    model = adapted.model
    base = replace(
        adapted.base, model=model, config=copy.deepcopy(adapted.base.config), fingerprint="", content_hash="", notes=[]
    )
    if dequantize and quantization.is_quantized(model):
        remove_quantization(base, DTYPES.get(base.precision.get("dtype", "native")))  # that of its activations
    adapted.round_whole_modules()
    for name in [name for name, layer in model.named_modules() if "lora_a" in layer]:
        try:
            fused = _fuse_layer(quantization.module_at(model, name))
        except Exception as error:  # architectures bring their own layers
            raise ModelError(
                f"The adapter of {name} cannot be merged into {base.model_path} (model_type "
                f"'{base.config.get('model_type')}'): {type(error).__name__}: {first_line(str(error))[:200]}. "
                "Export the adapter: --to mlx."
            ) from error
        mx.eval(fused.parameters())
        quantization.replace_module(model, name, fused)
    base.model.freeze()
    base.model.eval()
    mx.eval(base.model.parameters())
    return base


def _fuse_layer(adapter: nn.Module) -> nn.Module:
    """Return the base layer of `adapter` with its update; a quantized one is quantized again in the same way."""
    attribute = "embedding" if "embedding" in adapter else "linear"
    layer = adapter[attribute]
    if not quantization.is_quantized(layer):
        fused: nn.Module = adapter.fuse()
        return fused
    expanded = quantization.expanded_layer(layer, mx.float32)
    if expanded is None:
        raise TypeError(f"{type(layer).__name__} cannot be dequantized")
    setattr(adapter, attribute, expanded)
    return quantization.quantize_like(layer, adapter.fuse().weight)
