"""A quantized base of every mode is expanded to what MLX multiplies by; what stock mlx-lm keeps in its dtype stays."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tiny_models import MIXED, build_model, write_model

from runner.common.errors import ModelError
from runner.config.schema import ModelConfig
from runner.models import quantization
from runner.models.load import load_base_model

IDS = (mx.arange(96).reshape(2, 48) * 37 + 5) % 319 + 1
MODES = {
    **{f"affine-{bits}-32": {"mode": "affine", "bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)},
    "affine-4-64": {"mode": "affine", "bits": 4, "group_size": 64},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
    "mixed": {"mode": MIXED, "bits": 4, "group_size": 32},
}
FAMILIES = ("llama", "gemma2", "qwen3_moe", "gpt_oss", "llama4", "mamba", "kimi_linear", "deepseek_v3")
FAMILIES += ("glm4_moe_lite", "longcat_flash")
SAMPLE = [("llama", mode) for mode in MODES]  # and each other family with a mode of its own
SAMPLE += [(family, mode) for family, mode in zip(FAMILIES[1:], reversed(MODES), strict=False)]
ALL = [(family, mode) for family in FAMILIES for mode in MODES if (family, mode) not in SAMPLE]


def loss(model: nn.Module) -> float:
    logits = model(IDS[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, IDS[:, 1:]).mean().item()


@pytest.mark.parametrize(("family", "mode"), [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL)])
def test_the_expanded_model_has_the_loss_of_the_quantized_one_with_float32_activations(
    tmp_path: Path, family: str, mode: str
) -> None:
    folder = write_model(tmp_path / "model", family, dtype=mx.bfloat16, **MODES[mode])
    quantized, _ = load_model(folder)
    assert quantization.is_quantized(quantized)
    # MLX computes a quantized product in the dtype of the activations, if all else is float32.
    quantized.set_dtype(mx.float32, lambda dtype: dtype == mx.bfloat16)
    expanded = load_base_model(ModelConfig(path=str(folder), dequantize="always", dtype="float32"))
    assert not quantization.is_quantized(expanded.model)
    assert not any(name.endswith(("scales", "biases")) for name, _ in tree_flatten(expanded.model.parameters()))
    assert not {"quantization", "quantization_config"} & set(expanded.config)
    assert loss(expanded.model) == pytest.approx(loss(quantized), abs=1e-5)


def test_the_global_scale_of_nvfp4_experts_is_applied(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen3_moe", mode="nvfp4", global_scale=True)
    scaled = "model.layers.0.mlp.switch_mlp.up_proj"
    parameters = dict(tree_flatten(load_model(folder)[0].parameters()))
    assert parameters[f"{scaled}.global_scale"].shape == (4,)
    base = load_base_model(ModelConfig(path=str(folder), dequantize="always", dtype="float32"))
    expanded = dict(tree_flatten(base.model.parameters()))[f"{scaled}.weight"]
    original = dict(tree_flatten(build_model("qwen3_moe")[0].parameters()))[f"{scaled}.weight"]
    error = mx.abs(expanded - original).mean() / mx.abs(original).mean()
    assert error.item() < 0.12  # 4-bit rounding; without the scale it is above 1


@pytest.mark.cpu("a product that a GPU has")
def test_nvfp4_experts_with_a_global_scale_are_expanded_or_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen3_moe", mode="nvfp4", global_scale=True)
    assert not quantization.is_quantized(load_base_model(ModelConfig(path=str(folder))).model)
    with pytest.raises(ModelError, match=r"on a GPU only.*model\.dequantize=auto"):
        load_base_model(ModelConfig(path=str(folder), dequantize="never"))


def test_what_an_architecture_must_not_cast_keeps_its_dtype(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "deepseek_v3")
    parameters = dict(tree_flatten(load_base_model(ModelConfig(path=str(folder), dtype="bfloat16")).model.parameters()))
    kept = {name for name, array in parameters.items() if array.dtype == mx.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert parameters["model.layers.1.mlp.gate.weight"].dtype == mx.bfloat16


def test_quantized_activations_are_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", mode="mxfp8")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantize_activations": true,', 1))
    with pytest.raises(ModelError, match="Remove that key"):
        load_base_model(ModelConfig(path=str(folder)))


def test_a_layer_is_quantized_again_as_it_was(tmp_path: Path) -> None:
    for mode in ("affine", "mxfp4", "nvfp4"):
        folder = write_model(tmp_path / mode, "qwen3_moe", mode=mode, dtype=mx.bfloat16, global_scale=mode == "nvfp4")
        for name, layer in quantization.quantized_layers(load_model(folder)[0]).items():
            again = quantization.quantize_like(layer, quantization.expand_weight(layer, mx.float32))
            before, after = dict(tree_flatten(layer.parameters())), dict(tree_flatten(again.parameters()))
            assert before.keys() == after.keys(), (mode, name)
            assert all(before[key].dtype == after[key].dtype for key in before)
            values = [quantization.expand_weight(one, mx.float32) for one in (layer, again)]
            error = mx.abs(values[0] - values[1]).mean() / mx.abs(values[0]).mean()
            assert error.item() < 0.03, (mode, name)  # bfloat16 scales are rounded twice
