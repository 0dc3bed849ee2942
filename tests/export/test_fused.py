"""A base model with an adapter merged into it computes what base and adapter compute."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from tiny_models import write_model

from runner.config.schema import LoraConfig, ModelConfig
from runner.export.fused import fuse_adapter
from runner.export.mlx import write_model_folder
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel

IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 2]])


def with_random_adapter(base: BaseModel) -> AdaptedModel:
    adapted = AdaptedModel(base, LoraConfig(rank=4, num_layers=2), seed=0)
    for name, array in adapted.params().items():
        noise = mx.random.normal(array.shape, key=mx.random.key(len(name))) * 0.05
        adapted.model.load_weights([(name, array + noise)], strict=False)
    return adapted


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_fused_model_computes_what_base_and_adapter_compute(
    mixed_gguf: Path, tmp_path: Path, dequantize: bool
) -> None:
    config = ModelConfig(path=str(mixed_gguf), dtype="float32", dequantize="never")
    base_logits = load_base_model(config).model(IDS)
    adapted = with_random_adapter(load_base_model(config))
    adapted_logits = adapted.model(IDS)
    fused = fuse_adapter(adapted, dequantize=dequantize)
    write_model_folder(fused, tmp_path / "fused")
    error = mx.abs(mlx_lm.load(str(tmp_path / "fused"))[0](IDS) - adapted_logits)
    learned = mx.abs(adapted_logits - base_logits).mean().item()
    assert error.max().item() < 1e-3 * learned if dequantize else error.mean().item() < learned / 4
    quantization = fused.config.get("quantization")
    assert quantization is None if dequantize else quantization["model.layers.0.self_attn.k_proj"]["bits"] == 8


def test_weights_are_dequantized_in_the_dtype_that_the_run_multiplied_in(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", "llama", dtype=mx.bfloat16, mode="affine", bits=4, group_size=32)
    kept = ModelConfig(path=str(folder), dtype="float32", dequantize="never")
    fused = fuse_adapter(with_random_adapter(load_base_model(kept)), dequantize=True).model
    expanded = with_random_adapter(load_base_model(ModelConfig(path=str(folder), dtype="float32", dequantize="always")))
    assert {array.dtype for _, array in tree_flatten(fused.parameters())} == {mx.float32}
    assert mx.abs(fused(IDS) - expanded.model(IDS)).max().item() < 1e-4
