"""A llama model in a GGUF file of any supported type loads as the same model in MLX; others are refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from runner.common.errors import ModelError
from runner.models.gguf.load import GgufModel, load_gguf

BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 266, 2]])


def parameters(model: GgufModel) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.model.parameters())}


def dequantized_parameters(model: GgufModel) -> dict[str, np.ndarray]:
    dequantized = mlx_lm.utils.dequantize_model(model.model)
    return {name: np.array(array) for name, array in tree_flatten(dequantized.parameters())}


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("keep", [True, False], ids=["quantized", "dequantized"])
def test_every_supported_tensor_type_decodes_to_its_values(
    gguf_files: ModuleType, tmp_path: Path, type_name: str, keep: bool
) -> None:
    tiny = gguf_files.tiny_llama(dict.fromkeys(gguf_files.MATRICES, type_name))
    model = load_gguf(tiny.write(tmp_path / "tiny.gguf"), keep_quantized=keep, dtype=mx.float32)
    if keep and type_name in BITS:
        expected = {"group_size": 32, "bits": BITS[type_name], "mode": "affine"}
        assert model.config["quantization"] == expected
        assert model.model.layers[1].self_attn.k_proj.weight.dtype == mx.uint32
    else:
        assert "quantization" not in model.config
    actual = dequantized_parameters(model)
    assert actual.keys() == tiny.expected.keys()
    for name, values in tiny.expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_file_of_mixed_types_keeps_the_bits_of_each_layer(gguf_files: ModuleType, tmp_path: Path) -> None:
    path = gguf_files.tiny_llama(gguf_files.MIXED_TYPES).write(tmp_path / "tiny.gguf")
    quantized = load_gguf(path, keep_quantized=True, dtype=mx.float32)
    quantization = quantized.config["quantization"]
    bits = {name: quantization.get(name, quantization)["bits"] for name in ("model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens")}  # fmt: skip
    assert list(bits.values()) == [4, 8, 4, 8]
    assert quantized.model.layers[0].self_attn.v_proj.weight.dtype == mx.float32
    dequantized = load_gguf(path, keep_quantized=False, dtype=mx.float32)
    np.testing.assert_allclose(np.array(quantized.model(IDS)), np.array(dequantized.model(IDS)), atol=1e-4)


def test_biases_are_unpermuted_with_their_weights_and_missing_ones_are_zero(
    gguf_files: ModuleType, tmp_path: Path
) -> None:
    tiny = gguf_files.tiny_llama(biases=True)
    model = load_gguf(tiny.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)
    actual = parameters(model)
    for name, values in tiny.expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)
    assert not actual["model.layers.0.self_attn.o_proj.bias"].any()
    assert model.config["attention_bias"] and not model.config["mlp_bias"]


def test_a_separate_output_matrix_unties_the_embeddings(gguf_files: ModuleType, tmp_path: Path) -> None:
    tiny = gguf_files.tiny_llama(tied=False)
    model = load_gguf(tiny.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)
    assert model.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(parameters(model)["lm_head.weight"], tiny.expected["lm_head.weight"])


@pytest.mark.parametrize("keep", [True, False], ids=["quantized", "dequantized"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_saved_folder_loads_in_stock_mlx_lm_with_equal_logits_and_ids(
    gguf_files: ModuleType, tmp_path: Path, keep: bool, dtype: mx.Dtype
) -> None:
    path = gguf_files.tiny_llama(gguf_files.MIXED_TYPES, biases=True, tied=False).write(tmp_path / "tiny.gguf")
    ours = load_gguf(path, keep_quantized=keep, dtype=dtype)
    save_model_folder(ours, tmp_path / "folder")
    stock, tokenizer = mlx_lm.load(str(tmp_path / "folder"))
    assert mx.array_equal(stock(IDS), ours.model(IDS))
    assert stock(IDS).dtype == dtype
    text = " hello <|start|>12345<tool>é\n"
    assert tokenizer.encode(text) == ours.tokenizer.encode(text)
    assert tokenizer.eos_token_ids == ours.tokenizer.eos_token_ids == {2}
    assert type(tokenizer.detokenizer) is type(ours.tokenizer.detokenizer)


def save_model_folder(model: GgufModel, folder: Path) -> None:
    mlx_lm.utils.save_model(folder, model.model)
    mlx_lm.utils.save_config(dict(model.config), folder / "config.json")
    model.tokenizer.save_pretrained(folder)


def test_metadata_is_converted_to_the_hubs_config(gguf_files: ModuleType, tmp_path: Path) -> None:
    tiny = gguf_files.tiny_llama(
        llama__rope__freq_base=500000.0,
        llama__context_length=4096,
        tokenizer__ggml__eot_token_id=0,
        llama__attention__key_length=16,
        llama__attention__value_length=16,
    )
    config = load_gguf(tiny.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32).config
    assert (config["rope_theta"], config["max_position_embeddings"], config["head_dim"]) == (500000.0, 4096, 16)
    assert (config["rms_norm_eps"], config["rope_scaling"], config["tie_word_embeddings"]) == (1e-5, None, True)
    assert config["eos_token_id"] == [2, 0]


def llama3_factors(factor: float, original: int, base: float = 10000.0, width: int = 16) -> np.ndarray:
    """The RoPE factors by cases of the wavelength, as in Llama 3.1's release."""
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * np.pi * base ** (i / width)
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype="<f4")


def test_llama_3_rope_factors_are_converted_to_its_rope_scaling(gguf_files: ModuleType, tmp_path: Path) -> None:
    tiny = gguf_files.tiny_llama(llama__rope__scaling__original_context_length=1024)
    factors = llama3_factors(8.0, 1024)
    tiny.file.tensors["rope_freqs.weight"] = ("F32", (8,), factors.tobytes())
    model = load_gguf(tiny.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)
    assert model.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    plain = 10000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(np.array(model.model.layers[0].self_attn.rope._freqs) / plain, factors, rtol=1e-4)


def test_linear_rope_scaling_divides_positions(gguf_files: ModuleType, tmp_path: Path) -> None:
    tiny = gguf_files.tiny_llama(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    model = load_gguf(tiny.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)
    assert model.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert model.model.layers[0].self_attn.rope.scale == 0.25


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"general__architecture": "qwen3vl"}, "'qwen3vl'.*supported: llama, qwen2.*safetensors"),
        ({"general__architecture": "qwen3"}, "'qwen3.block_count' is missing"),
        ({"general__architecture": None}, "None.*supported: llama"),
        ({"llama__expert_count": 8}, "'llama.expert_used_count' is missing"),
        ({"llama__expert_count": 8, "llama__expert_used_count": 9}, "uses 9 experts of 8"),
        ({"llama__expert_count": 8, "llama__expert_used_count": 2}, "'blk.0.ffn_gate_exps.weight' is missing"),
        ({"llama__rope__scaling__type": "dynamic"}, "'dynamic' is not supported.*linear"),
        (
            {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0},
            "original_context_length' is missing",
        ),
        ({"llama__rope__scaling__attn_factor": 1.5}, "attn_factor' is 1.5, which is not supported"),
        ({"llama__attention__sliding_window": 128}, "sliding_window' is 128, which is not supported"),
        ({"llama__final_logit_softcapping": 30.0}, "final_logit_softcapping' is 30.0, which is not supported"),
        ({"llama__rope__dimension_count": 8}, "dimension_count' is 8, but a head has 16"),
        ({"llama__attention__head_count_kv": [2, 2]}, "head_count_kv' is a list"),
        ({"llama__attention__head_count": 8, "llama__rope__dimension_count": 8}, "do not fit|should be"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon' is missing"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon' is nan"),
        ({"llama__block_count": 4_000_000_000}, "block_count' is 4000000000"),
        ({"llama__block_count": 3}, "'blk.2.attn_norm.weight' is missing"),
        ({"llama__block_count": 1}, "'blk.1.*' is not part of"),
        (
            {"llama__embedding_length": 2_000_000_000, "llama__attention__key_length": 16},
            "token_embd.weight' has the shape",
        ),
        ({"llama__embedding_length": "64"}, "'64', where one int"),
        ({"split__count": 3}, "one part of a split model"),
        ({"tokenizer__ggml__pre": "kimi-k2"}, "'kimi-k2'.*supported: smollm.*safetensors"),
        ({"tokenizer__ggml__model": "bert"}, "'bert', which is not supported.*'gpt2'.*'llama', SentencePiece"),
        ({"tokenizer__ggml__model": "llama"}, "no score .tokenizer.ggml.scores. for each of its 268 tokens"),
    ],
    ids=lambda item: next(iter(item)) if isinstance(item, dict) else "",
)
def test_unsupported_settings_are_refused_by_name(
    gguf_files: ModuleType, tmp_path: Path, metadata: dict[str, Any], reason: str
) -> None:
    path = gguf_files.tiny_llama(**metadata).write(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=rf"tiny\.gguf: .*{reason}"):
        load_gguf(path, keep_quantized=False, dtype=mx.float32)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("blk.1.attn_k.weight", ("IQ2_XXS", (32, 64), bytes(9999)), "'blk.1.attn_k.weight' is of ggml type IQ2_XXS"),
        ("blk.1.attn_k.weight", None, "'blk.1.attn_k.weight' is missing"),
        ("blk.1.attn_k.weight", ("F32", (64, 64), bytes(4 * 64 * 64)), r"shape \(64, 64\), not \(32, 64\)"),
        ("blk.0.ffn_gate_inp.weight", ("F32", (64,), bytes(256)), "'blk.0.ffn_gate_inp.weight' is not part of"),
        ("blk.0.attn_norm.bias", ("F32", (64,), bytes(256)), "'blk.0.attn_norm.bias' is not part of"),
        ("blk.0.attn_norm.weight", ("Q8_0", (64,), bytes(68)), "Q8_0 but not a matrix"),
        ("output_norm.weight", ("F32", (64,), b"\0\0\xc0\x7f" * 64), "NaN or Inf"),
        ("rope_freqs.weight", ("F32", (8,), np.arange(1, 9, dtype="<f4").tobytes()), "rope_freqs.weight are not"),
        ("rope_freqs.weight", ("F32", (4,), bytes(16)), "rope_freqs.weight has 4 values, a head needs 8"),
    ],
    ids=lambda item: item if isinstance(item, str) and item.isidentifier() else "",
)
def test_an_invalid_tensor_is_refused_by_name(
    gguf_files: ModuleType, tmp_path: Path, name: str, tensor: Any, reason: str
) -> None:
    tiny = gguf_files.tiny_llama()
    if tensor is None:
        del tiny.file.tensors[name]
    else:
        tiny.file.tensors[name] = tensor
    with pytest.raises(ModelError, match=rf"tiny\.gguf: .*{reason}"):
        load_gguf(tiny.write(tmp_path / "tiny.gguf"), keep_quantized=True, dtype=mx.float32)


def test_more_tokens_than_embeddings_are_refused(gguf_files: ModuleType, tmp_path: Path) -> None:
    tiny = gguf_files.tiny_llama()
    tokens = [*gguf_files.vocabulary()["tokenizer.ggml.tokens"], "more"]
    tiny.file.metadata |= gguf_files.vocabulary(tokens=tokens, token_type=[1] * len(tokens))
    with pytest.raises(ModelError, match="269 tokens, but embeddings for 268"):
        load_gguf(tiny.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)


WRONG = {
    "zero": 0,
    "huge": (1 << 32) - 1,
    "negative": struct.pack("<Ii", 5, -1),
    "truth": True,
    "not a number": float("nan"),
    "endless": struct.pack("<Id", 12, 1e300),
    "text": "llama",
    "numbers": [1, 2],
    "texts": ["a", "b"],
    "nothing": [],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.filterwarnings("ignore:overflow")
def test_any_value_under_any_metadata_key_loads_or_raises_a_model_error(
    gguf_files: ModuleType, tmp_path: Path, wrong: str
) -> None:
    tiny = gguf_files.tiny_llama(split__count=1, llama__rope__scaling__type="linear", llama__rope__scaling__factor=2.0)
    extra = ("llama.attention.key_length", "llama.attention.scale", "tokenizer.ggml.add_eos_token", "general.alignment")
    refused = 0
    for key in [*tiny.file.metadata, *extra]:
        metadata = {**tiny.file.metadata, key: WRONG[wrong]}
        path = type(tiny.file)(metadata, tiny.file.tensors).write(tmp_path / "tiny.gguf")
        try:
            load_gguf(path, keep_quantized=False, dtype=mx.float32)
        except ModelError as error:
            assert "tiny.gguf: " in str(error)
            refused += 1
    assert refused > 10
