"""A fused model of every architecture and quantization is what stock mlx-lm loads, or nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from tiny_models import CONFIGS, MIXED, write_model

from runner.common.errors import ModelError
from runner.config.schema import LoraConfig, ModelConfig
from runner.export import mlx as export_mlx
from runner.export import verify_export
from runner.export.fused import fuse_adapter
from runner.models import quantization
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel

IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 2]])
MODES = {"affine": {"bits": 8, "group_size": 32}, MIXED: {"bits": 4, "group_size": 32}, "mxfp8": {}, "nvfp4": {}}
SAMPLE = [("deepseek_v3", "affine"), ("longcat_flash", MIXED), ("gpt_oss", "mxfp8")]
ALL = [(family, mode) for family in CONFIGS for mode in MODES if (family, mode) not in SAMPLE]


def adapted_model(folder: Path, dequantize: str) -> AdaptedModel:
    """Return the model with a random adapter in every block."""
    base = load_base_model(ModelConfig(path=str(folder), dtype="float32", dequantize=dequantize))
    adapted = AdaptedModel(base, LoraConfig(rank=4, num_layers=-1), seed=0)
    adapted.place(
        {
            name: array + mx.random.normal(array.shape, key=mx.random.key(len(name))) * 0.05
            for name, array in adapted.params().items()
        }
    )
    adapted.model.eval()
    return adapted


def exported(adapted: AdaptedModel, target: Path, *, dequantize: bool) -> mx.array:
    export_mlx.export_model(fuse_adapter(adapted, dequantize=dequantize), target)
    return mlx_lm.load(str(target))[0](IDS)


@pytest.mark.parametrize(("family", "mode"), [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL)])
def test_a_fused_quantized_model_loads_in_stock_mlx_lm(tmp_path: Path, family: str, mode: str) -> None:
    folder = write_model(tmp_path / "base", family, dtype=mx.bfloat16, mode=mode, **MODES[mode])
    adapted = adapted_model(folder, "always")
    expected = adapted.model(IDS)
    assert mx.abs(exported(adapted, tmp_path / "whole", dequantize=True) - expected).max().item() < 1e-3
    adapted = adapted_model(folder, "never")
    expected = adapted.model(IDS)
    base = load_base_model(ModelConfig(path=str(folder), dtype="float32", dequantize="never"))
    learned = mx.abs(expected - base.model(IDS)).mean()
    rounding = mx.abs(exported(adapted, tmp_path / "kept", dequantize=False) - expected).mean()
    assert rounding.item() < (0.2 if mode == "affine" else 0.8) * learned.item()
    assert quantization.is_quantized(mlx_lm.load(str(tmp_path / "kept"))[0])


def test_experts_with_a_global_scale_are_merged_with_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", "qwen3_moe", mode="nvfp4", global_scale=True)
    adapted = adapted_model(folder, "always")
    expected = adapted.model(IDS)
    assert mx.abs(exported(adapted, tmp_path / "whole", dequantize=True) - expected).max().item() < 1e-3


def change_config(base: BaseModel) -> None:
    base.config["rope_theta"] = 10.0


def add_array(base: BaseModel) -> None:
    base.model.surplus = mx.zeros((3,))


def claim_other_type(base: BaseModel) -> None:
    base.config["model_type"] = "unheard_of"


@pytest.mark.parametrize(
    ("change", "reason"),
    [(change_config, "its logits differ"), (add_array, "surplus"), (claim_other_type, "unheard_of not supported")],
)
def test_a_folder_that_mlx_lm_reads_differently_is_not_written(
    tmp_path: Path, change: Callable[[BaseModel], None], reason: str
) -> None:
    base = load_base_model(ModelConfig(path=str(write_model(tmp_path / "base", "llama"))))
    base.config = json.loads(json.dumps(base.config))
    change(base)
    with pytest.raises(ModelError, match=f"is not written, because mlx-lm .*{reason}"):
        export_mlx.export_model(base, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


def test_changed_bytes_of_a_written_weight_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base_model(ModelConfig(path=str(write_model(tmp_path / "base", "llama"))))
    write = export_mlx.write_model_folder

    def write_and_damage(base: BaseModel, folder: Path) -> None:
        write(base, folder)
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(export_mlx, "write_model_folder", write_and_damage)
    with pytest.raises(ModelError, match="has other values"):
        export_mlx.export_model(base, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


def test_a_layer_that_cannot_be_merged_is_named(tmp_path: Path) -> None:
    adapted = adapted_model(write_model(tmp_path / "base", "llama"), "auto")
    layer = adapted.model.layers[0].self_attn.q_proj
    layer.fuse = lambda: layer.no_such_attribute
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be merged.*--to mlx"):
        fuse_adapter(adapted, dequantize=False)


class RulesOutAToken(nn.Module):
    """A model whose logits of one token are infinite, as phi3small's."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def __call__(self, ids: mx.array) -> mx.array:
        logits = mx.repeat(ids[..., None].astype(mx.float32), 4, axis=-1) + self.offset
        return mx.where(mx.arange(4) == 0, -float("inf"), logits)


def test_tokens_that_a_model_rules_out_hide_no_difference_of_logits() -> None:
    assert verify_export._logits_difference(RulesOutAToken(0), RulesOutAToken(0)) is None
    assert "its logits differ by up to 0.5" in str(
        verify_export._logits_difference(RulesOutAToken(0), RulesOutAToken(0.5))
    )


def test_only_rounding_passes_as_the_same_weight() -> None:
    weight = mx.random.normal((8, 8), key=mx.random.key(0))
    assert verify_export._equal_weights(weight, weight * (1 + 2e-7))
    assert not verify_export._equal_weights(weight, weight * (1 + 2e-6))
