"""The small model, loaded from its GGUF file, agrees with independent readers of that file.

The reference is reference/smollm2_135m.json: transformers and torch for the weights, a plain BPE for the token ids.
Measured over its 325 tokens on an x86-64 CPU with OpenBLAS, the largest difference of a log-probability was 4.5e-5
(mean 4e-6); the quantized model differs from the dequantized one by up to 5e-5.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from runner.models.gguf.load import GgufModel, load_gguf

TOLERANCE = 2e-4
"""Of a log-probability, in nats."""

SCRIPT = Path(__file__).parent / "reference" / "make_reference.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dequantized(smollm2: Path) -> GgufModel:
    return load_gguf(smollm2, keep_quantized=False, dtype=mx.float32)


@pytest.fixture(scope="module")
def quantized(smollm2: Path) -> GgufModel:
    return load_gguf(smollm2, keep_quantized=True, dtype=mx.float32)


def log_probabilities(model: GgufModel, ids: list[int]) -> np.ndarray:
    """The log-probability of each token but the first, given those before it: float64 (length - 1,)."""
    logits = np.array(model.model(mx.array([ids]))[0, :-1]).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return chosen - np.log(np.exp(logits).sum(axis=-1))


@pytest.mark.parametrize("name", ["prose", "code", "sql", "mixed"])
def test_log_probabilities_equal_those_of_transformers(
    dequantized: GgufModel, reference: dict[str, Any], name: str
) -> None:
    text = reference["texts"][name]
    assert dequantized.tokenizer.encode(text["text"]) == text["ids"]
    np.testing.assert_allclose(
        log_probabilities(dequantized, text["ids"]), text["log_probabilities"], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("number", [0, 2, 3, *(pytest.param(number, marks=pytest.mark.long) for number in (1, 4))])
def test_greedy_answers_equal_those_of_transformers(
    dequantized: GgufModel, reference: dict[str, Any], number: int
) -> None:
    row = reference["greedy"][number]
    messages = [{"role": "user", "content": row["prompt"]}]
    prompt = dequantized.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == row["prompt_ids"]
    steps = list(mlx_lm.stream_generate(dequantized.model, dequantized.tokenizer, prompt, max_tokens=24))
    assert [step.token for step in steps] == row["new_ids"]
    assert "".join(step.text for step in steps) == row["text"]


def test_token_ids_of_unusual_texts_equal_the_reference(dequantized: GgufModel, reference: dict[str, Any]) -> None:
    actual = {row["text"]: dequantized.tokenizer.encode(row["text"]) for row in reference["token_ids"]}
    assert actual == {row["text"]: row["ids"] for row in reference["token_ids"]}
    assert len(actual) > 50


def test_token_ids_decode_to_their_text(dequantized: GgufModel, reference: dict[str, Any]) -> None:
    for row in reference["token_ids"]:
        assert dequantized.tokenizer.decode(row["ids"]) == row["text"]


def test_the_quantized_model_dequantizes_to_exactly_the_same_weights(dequantized: GgufModel, smollm2: Path) -> None:
    quantized = load_gguf(smollm2, keep_quantized=True, dtype=mx.float32)  # not the fixture: dequantized in place
    assert quantized.config["quantization"]["bits"] == 4
    assert quantized.config["quantization"]["model.embed_tokens"]["bits"] == 8
    weights = dict(tree_flatten(mlx_lm.utils.dequantize_model(quantized.model).parameters()))
    for name, array in tree_flatten(dequantized.model.parameters()):
        assert mx.array_equal(array, weights[name]), name


def test_the_quantized_model_gives_the_same_log_probabilities(quantized: GgufModel, reference: dict[str, Any]) -> None:
    text = reference["texts"]["code"]
    actual = log_probabilities(quantized, text["ids"][:16])
    np.testing.assert_allclose(actual, text["log_probabilities"][:15], rtol=0, atol=TOLERANCE)


def test_packed_weights_equal_those_that_mlx_loads(quantized: GgufModel, smollm2: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"  # mx.load opens a file for writing
    copy.write_bytes(smollm2.read_bytes())
    theirs = mx.load(str(copy))
    ours = dict(tree_flatten(quantized.model.parameters()))
    for source, target in {
        "token_embd": "model.embed_tokens",
        "blk.7.attn_v": "model.layers.7.self_attn.v_proj",
        "blk.29.ffn_down": "model.layers.29.mlp.down_proj",
    }.items():
        assert mx.array_equal(theirs[f"{source}.weight"], ours[f"{target}.weight"])
        for part in ("scales", "biases"):
            assert mx.array_equal(theirs[f"{source}.{part}"].astype(mx.float32), ours[f"{target}.{part}"])


def test_a_saved_folder_loads_in_stock_mlx_lm_with_equal_logits_and_ids(
    quantized: GgufModel, reference: dict[str, Any], tmp_path: Path
) -> None:
    mlx_lm.utils.save_model(tmp_path, quantized.model)
    mlx_lm.utils.save_config(dict(quantized.config), tmp_path / "config.json")
    quantized.tokenizer.save_pretrained(tmp_path)
    stock, tokenizer = mlx_lm.load(str(tmp_path))
    ids = mx.array([reference["texts"]["prose"]["ids"][:8]])
    assert mx.array_equal(stock(ids), quantized.model(ids))
    for row in reference["token_ids"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages) == quantized.tokenizer.apply_chat_template(messages)


@pytest.mark.reference
def test_the_reference_can_be_reproduced(reference: dict[str, Any], smollm2: Path, tmp_path: Path) -> None:
    python = os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    out = tmp_path / "again.json"
    command = [python, str(SCRIPT), "--gguf", str(smollm2), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["file"]["sha256"] == reference["file"]["sha256"]
    assert again["token_ids"] == reference["token_ids"]
    for name, text in reference["texts"].items():
        assert again["texts"][name]["ids"] == text["ids"]
        np.testing.assert_allclose(
            again["texts"][name]["log_probabilities"], text["log_probabilities"], rtol=0, atol=TOLERANCE
        )
    for new, old in zip(again["greedy"], reference["greedy"], strict=True):
        assert (new["prompt_ids"], new["new_ids"], new["text"]) == (old["prompt_ids"], old["new_ids"], old["text"])
