"""Merge an adapter into the weights of its base model."""

from __future__ import annotations

import copy
from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_unflatten

from runner.models.load import BaseModel, remove_quantization
from runner.models.lora import AdaptedModel


def fuse_adapter(adapted: AdaptedModel, *, dequantize: bool) -> BaseModel:
    """Add the adapter's update to the base model's weights and return the base model; `adapted` is used up.

    A quantized layer with an adapter is dequantized, updated and quantized again as before, which rounds the update.
    With `dequantize` the whole model is dequantized instead and nothing is rounded.
    """
    model = adapted.model
    fused = [(name, layer.fuse(dequantize=dequantize)) for name, layer in model.named_modules() if "lora_a" in layer]
    model.update_modules(tree_unflatten(fused))
    base = replace(
        adapted.base, model=model, config=copy.deepcopy(adapted.base.config), fingerprint="", content_hash="", notes=[]
    )
    if dequantize:
        remove_quantization(base)
    base.model.freeze()
    base.model.eval()
    mx.eval(base.model.parameters())
    return base
