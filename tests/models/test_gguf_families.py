"""A model of each family, written as a GGUF file by the rules of llama.cpp's converter, loads as the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_families
import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from gguf_families import CASES
from mlx.utils import tree_flatten

from runner.common.errors import ModelError
from runner.models.gguf.families import FAMILIES
from runner.models.gguf.load import load_gguf

IDS = mx.array([[1, *range(60, 82), 2]])
"""Longer than the sliding windows of the tiny models."""
BLOCKS: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "gguf_blocks.json").read_text())["types"]


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_gives_the_logits_of_the_original(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original = gguf_families.build_model(case.config)
    file = gguf_families.write_weights(case, gguf_families.weights_of(original))
    loaded = load_gguf(file.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)
    assert type(loaded.model) is type(original)
    assert loaded.notes == []
    expected = np.array(original(IDS))
    np.testing.assert_allclose(np.array(loaded.model(IDS)), expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 0.5
    mlx_lm.utils.save_model(tmp_path / "folder", loaded.model)
    mlx_lm.utils.save_config(dict(loaded.config), tmp_path / "folder" / "config.json")
    stock, _ = mlx_lm.utils.load_model(tmp_path / "folder")
    assert mx.array_equal(stock(IDS), loaded.model(IDS))


TYPES = {
    "attn_q": "Q4_K", "attn_k": "Q6_K", "attn_v": "Q5_K", "attn_output": "Q3_K", "ffn_gate": "Q2_K", "ffn_up": "Q5_0",
    "ffn_down": "IQ4_XS", "token_embd": "Q6_K", "output": "Q5_1", "ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q8_0",
    "ffn_down_exps": "Q6_K", "attn_qkv": "Q5_K",
}  # fmt: skip
"""The block type of each tensor; the file's blocks are those of the reference in random order."""


def quantized_case(name: str) -> tuple[gguf_families.Case, dict[str, np.ndarray], Any]:
    """A case wide enough for blocks of 256 values, its weights, and the encoding of its tensors."""
    case = CASES[name]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
    config = case.config | {key: size for key, size in sizes.items() if key in case.config or key == "hidden_size"}
    case = gguf_families.Case(case.architecture, config, case.metadata)
    random = np.random.default_rng(5)
    encoded: dict[str, tuple[str, bytes]] = {}
    weights = gguf_families.weights_of(gguf_families.build_model(config))
    for parameter, values in weights.items():
        tensor = gguf_families.tensor_name(parameter, case.architecture)
        if (type_name := TYPES.get(tensor.split(".")[-2])) is None:
            continue
        raw = np.frombuffer(bytes.fromhex(BLOCKS[type_name]["blocks"]), np.uint8).reshape(2, -1)
        expected = np.frombuffer(bytes.fromhex(BLOCKS[type_name]["values"]), "<f4").reshape(2, -1)
        chosen = random.integers(0, 2, values.size // expected.shape[1])
        encoded[tensor] = type_name, raw[chosen].tobytes()
        decoded = expected[chosen].reshape(values.shape)
        if case.architecture == "llama" and tensor.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config["num_attention_heads" if "attn_q" in tensor else "num_key_value_heads"]
            half = decoded.shape[0] // heads // 2  # from llama.cpp's order to the hub's
            decoded = decoded.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(decoded.shape)
        weights[parameter] = decoded
    return case, weights, lambda name, values: encoded.get(name, ("F32", values.astype("<f4").tobytes()))


@pytest.mark.parametrize("keep", [True, False], ids=["quantized", "dequantized"])
@pytest.mark.parametrize("name", ["mistral-nemo", "mixtral", "qwen3moe", "phi3"])
def test_block_quantized_weights_are_those_of_the_independent_expansion(name: str, keep: bool, tmp_path: Path) -> None:
    case, weights, encode = quantized_case(name)
    file = gguf_families.write_weights(case, weights, encode)
    loaded = load_gguf(file.write(tmp_path / "tiny.gguf"), keep_quantized=keep, dtype=mx.float32)
    if keep:
        assert loaded.notes and "Q6_K" in loaded.notes[0] and "expanded to float32" in loaded.notes[0]
        assert "Q4_K" not in loaded.notes[0]
        kept = {layer.bits for layer in loaded.model.modules() if hasattr(layer, "bits")}
        assert kept >= ({5} if name == "phi3" else {4, 5})
    actual = gguf_families.weights_of(mlx_lm.utils.dequantize_model(loaded.model) if keep else loaded.model)
    assert actual.keys() == weights.keys()
    for parameter, expected in weights.items():
        np.testing.assert_array_equal(actual[parameter], expected, err_msg=parameter)


@pytest.mark.parametrize(
    ("name", "metadata", "reason"),
    [
        ("qwen2", {"attention.key_length": 32, "attention.value_length": 32}, "4 heads of 32 do not fit .* 64"),
        ("qwen2", {"attention.head_count_kv": 3}, "4 heads cannot share 3"),
        ("mixtral", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "'linear' is not supported for.*none"),
        ("qwen3moe", {"expert_weights_norm": False}, "expert_weights_norm' is False, which is not supported"),
        ("qwen3moe", {"expert_count": 5}, r"shape \(4, 32, 64\), not \(5, rows, 64\)"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping' is 30.0, which is not supported"),
        ("gemma3", {"attention.sliding_window_pattern": [1, 0, 1, 1, 0, 1, 1]}, "no regular period"),
        ("gemma", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping' is 30.0, which is not supported"),
        ("phi3-long", {"rope.scaling.attn_factor": 1.0}, "attn_factor' is 1.0.*mlx-lm computes 1.2247"),
        ("phi3-long", {"rope.dimension_count": 10}, "rope_factors_long.weight has 6 values, a head needs 5"),
        ("phi3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "original_context_length' is missing"),
        ("qwen2-yarn", {"rope.scaling.yarn_attn_factor": 2.0}, "yarn_attn_factor' is 2.0"),
    ],
)
def test_settings_without_a_counterpart_are_refused(
    name: str, metadata: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    case = CASES[name]
    file = gguf_families.write_weights(case, gguf_families.weights_of(gguf_families.build_model(case.config)))
    file.metadata |= {f"{case.architecture}.{key}": value for key, value in metadata.items()}
    with pytest.raises(ModelError, match=rf"tiny\.gguf: .*{reason}"):
        load_gguf(file.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)


def test_a_missing_bias_is_refused_where_the_model_class_has_one(tmp_path: Path) -> None:
    case = CASES["qwen2"]
    file = gguf_families.write_weights(case, gguf_families.weights_of(gguf_families.build_model(case.config)))
    del file.tensors["blk.1.attn_k.bias"]
    with pytest.raises(ModelError, match=r"no tensor for model\.layers\.1\.self_attn\.k_proj\.bias"):
        load_gguf(file.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)


def test_windows_that_mlx_lm_does_not_compute_and_unknown_metadata_are_noted(tmp_path: Path) -> None:
    case = CASES["gemma2"]
    file = gguf_families.write_weights(case, gguf_families.weights_of(gguf_families.build_model(case.config)))
    file.metadata |= {"gemma2.attention.sliding_window": 128, "gemma2.new_setting": 1}
    notes = load_gguf(file.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32).notes
    assert ["128 tokens" in notes[0], "gemma2.new_setting" in notes[1], len(notes)] == [True, True, 2]


def test_experts_in_separate_tensors_are_refused_with_the_way_out(tmp_path: Path) -> None:
    case = CASES["mixtral"]
    file = gguf_families.write_weights(case, gguf_families.weights_of(gguf_families.build_model(case.config)))
    for stem in ("ffn_gate", "ffn_up", "ffn_down"):
        type_name, shape, raw = file.tensors.pop(f"blk.0.{stem}_exps.weight")
        file.tensors[f"blk.0.{stem}.0.weight"] = (type_name, shape[1:], raw[: len(raw) // 4])
    with pytest.raises(ModelError, match="each expert apart.*convert the model again"):
        load_gguf(file.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)


@pytest.mark.parametrize(("name", "dtype"), [("mistral-nemo", mx.float16), ("gemma3", mx.bfloat16)])
def test_the_native_dtype_is_the_16_bits_that_the_family_bears(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    case, weights, encode = quantized_case(name)
    file = gguf_families.write_weights(case, weights, encode)
    loaded = load_gguf(file.write(tmp_path / "tiny.gguf"), keep_quantized=True, dtype=None)
    assert {array.dtype for _, array in tree_flatten(loaded.model.parameters())} == {dtype, mx.uint32}
    assert f"expanded to {loaded.config['torch_dtype']}" in loaded.notes[0]
