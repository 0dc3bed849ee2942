"""A base model written as a folder, whatever it was read from, is the same model in stock mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from runner.config.schema import ModelConfig
from runner.export.mlx import export_model, write_model_folder
from runner.models.load import load_base_model

IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 2]])


@pytest.mark.parametrize("dequantize", ["always", "never"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_model_is_exported_as_a_folder_of_the_same_model(
    mixed_gguf: Path, tmp_path: Path, dequantize: str, dtype: str
) -> None:
    base = load_base_model(ModelConfig(path=str(mixed_gguf), dtype=dtype, dequantize=dequantize))
    write_model_folder(base, tmp_path / "folder")
    model, tokenizer = mlx_lm.load(str(tmp_path / "folder"))
    assert mx.array_equal(model(IDS), base.model(IDS))
    assert tokenizer.encode(" hello<|stop|>") == base.tokenizer.encode(" hello<|stop|>")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert ("quantization" in config) == (dequantize == "never")
    assert config["torch_dtype"] == dtype
    reloaded = load_base_model(ModelConfig(path=str(tmp_path / "folder"), dtype=dtype, dequantize=dequantize))
    assert reloaded.fingerprint == base.fingerprint


def test_the_generation_config_is_copied_with_the_model(tmp_path: Path) -> None:
    write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), tmp_path / "one")
    (tmp_path / "one" / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    base = load_base_model(ModelConfig(path=str(tmp_path / "one")))
    write_model_folder(base, tmp_path / "two")
    assert (tmp_path / "two" / "generation_config.json").read_text() == '{"eos_token_id": [2, 0]}'
    assert mlx_lm.load(str(tmp_path / "two"))[1].eos_token_ids == base.tokenizer.eos_token_ids


def test_a_tokenizer_with_several_chat_templates_is_exported(tmp_path: Path) -> None:
    base = load_base_model(ModelConfig(path="builtin:tiny"))
    template = base.tokenizer.chat_template
    base.tokenizer._tokenizer.chat_template = {"default": template, "tool_use": "{# tools #}" + template}
    export_model(base, tmp_path / "model")
    templates = mlx_lm.load(str(tmp_path / "model"))[1]._tokenizer.chat_template
    assert templates == {"default": template, "tool_use": "{# tools #}" + template}
