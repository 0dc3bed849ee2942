"""A base written as a folder, whatever it was read from, is the same base in stock mlx-lm; so is a merged one."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx_lm
import pytest

from runner.config import schema
from runner.export.fused import fuse_adapter
from runner.export.mlx import write_model_folder
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel

IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 2]])


def adapted(base: BaseModel) -> AdaptedModel:
    made = AdaptedModel(base, schema.LoraConfig(rank=4, num_layers=2), seed=0)
    for name, array in made.params().items():
        noise = mx.random.normal(array.shape, key=mx.random.key(len(name))) * 0.05
        made.model.load_weights([(name, array + noise)], strict=False)
    return made


@pytest.fixture
def gguf(gguf_files: ModuleType, tmp_path: Path) -> Path:
    return gguf_files.tiny_llama(gguf_files.MIXED_TYPES, biases=True, tied=False).write(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("dequantize", ["always", "never"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_becomes_a_folder_of_the_same_model(
    gguf: Path, tmp_path: Path, dequantize: str, dtype: str
) -> None:
    base = load_base_model(schema.ModelConfig(path=str(gguf), dtype=dtype, dequantize=dequantize))
    write_model_folder(base, tmp_path / "folder")
    model, tokenizer = mlx_lm.load(str(tmp_path / "folder"))
    assert mx.array_equal(model(IDS), base.model(IDS))
    assert tokenizer.encode(" hello<|stop|>") == base.tokenizer.encode(" hello<|stop|>")
    about = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert ("quantization" in about) == (dequantize == "never")
    assert about["torch_dtype"] == dtype
    again = load_base_model(schema.ModelConfig(path=str(tmp_path / "folder"), dtype=dtype, dequantize=dequantize))
    assert again.fingerprint == base.fingerprint


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    write_model_folder(load_base_model(schema.ModelConfig(path="builtin:tiny")), tmp_path / "one")
    (tmp_path / "one" / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    base = load_base_model(schema.ModelConfig(path=str(tmp_path / "one")))
    write_model_folder(base, tmp_path / "two")
    assert (tmp_path / "two" / "generation_config.json").read_text() == '{"eos_token_id": [2, 0]}'
    assert mlx_lm.load(str(tmp_path / "two"))[1].eos_token_ids == base.tokenizer.eos_token_ids


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_merged_model_computes_what_base_and_adapter_compute(gguf: Path, tmp_path: Path, dequantize: bool) -> None:
    made = adapted(load_base_model(schema.ModelConfig(path=str(gguf), dtype="float32", dequantize="never")))
    bare = load_base_model(schema.ModelConfig(path=str(gguf), dtype="float32", dequantize="never")).model(IDS)
    expected = made.model(IDS)
    merged = fuse_adapter(made, dequantize=dequantize)
    write_model_folder(merged, tmp_path / "fused")
    found = mlx_lm.load(str(tmp_path / "fused"))[0](IDS)
    learned = mx.abs(expected - bare).mean().item()
    off = mx.abs(found - expected)
    assert off.max().item() < 1e-3 * learned if dequantize else off.mean().item() < learned / 4
    quantization = merged.config.get("quantization")
    assert quantization is None if dequantize else quantization["model.layers.0.self_attn.k_proj"]["bits"] == 8
