"""A model written as GGUF is the same model to our reader, to transformers and to llama.cpp; so is its tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_families
import mlx.core as mx
import numpy as np
import pytest
from gguf_families import CASES

from runner.cli.commands import export
from runner.common.errors import ModelError
from runner.config.schema import ModelConfig
from runner.export.gguf import write_file
from runner.export.gguf_metadata import find_architecture
from runner.models.gguf.header import read_header
from runner.models.load import BaseModel, load_base_model

IDS = mx.array([[1, *range(60, 82), 2]])
REFERENCE = Path(__file__).resolve().parents[1] / "models" / "reference"


def model_of(name: str, folder: Path, **settings: Any) -> BaseModel:
    case = CASES[name]
    weights = gguf_families.weights_of(gguf_families.build_model(case.config))
    file = gguf_families.write_weights(case, weights).write(folder / f"{name}-source.gguf")
    return load_base_model(ModelConfig(path=str(file), **settings))


def write(base: BaseModel, path: Path, type_name: str, **settings: Any) -> BaseModel:
    architecture, family = find_architecture(base)
    write_file(base, path, architecture, family, type_name, None)
    return load_base_model(ModelConfig(path=str(path), **settings))


@pytest.mark.parametrize("name", [name for name in CASES if name != "gemma2-27b"])
def test_every_family_is_read_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    base = model_of(name, tmp_path)
    written = write(base, tmp_path / "written.gguf", "f32")
    assert mx.array_equal(written.model(IDS), base.model(IDS))
    assert {**written.config, "torch_dtype": None} == {**base.config, "torch_dtype": None}
    for text in ("hello 123 <tool>\n", "  12hello"):
        assert written.tokenizer.encode(text) == base.tokenizer.encode(text)
    assert written.tokenizer.chat_template == base.tokenizer.chat_template
    assert written.tokenizer.eos_token_ids == base.tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("type_name", "stored", "tolerance"), [("f16", "F16", 2e-3), ("bf16", "BF16", 1e-2), ("q8_0", "Q8_0", 2e-2)]
)
def test_weights_are_rounded_to_the_chosen_type(type_name: str, stored: str, tolerance: float, tmp_path: Path) -> None:
    expanded = {"dtype": "float32", "dequantize": "always"}  # what auto is on the CPU; a GPU keeps the file's types
    base = model_of("qwen3", tmp_path, **expanded)
    written = write(base, tmp_path / "written.gguf", type_name, **expanded)
    tensors = read_header(tmp_path / "written.gguf").tensors
    assert tensors["blk.1.ffn_down.weight"].type_name == stored
    assert tensors["blk.1.attn_norm.weight"].type_name == "F32"
    expected, actual = (dict(gguf_families.weights_of(b.model)) for b in (base, written))
    for parameter, values in expected.items():
        assert np.abs(actual[parameter] - values).max() <= tolerance * np.abs(values).max(), parameter


def test_an_architecture_without_a_file_is_refused(tmp_path: Path) -> None:
    base = model_of("qwen3", tmp_path)
    base.config["model_type"] = "mamba"
    with pytest.raises(ModelError, match="'mamba' cannot be exported as GGUF.*--to fused"):
        find_architecture(base)


def test_what_llama_cpp_computes_in_another_way_is_refused(tmp_path: Path) -> None:
    base = model_of("gemma2", tmp_path)
    base.model.args.query_pre_attn_scalar = 77
    with pytest.raises(ModelError, match="query_pre_attn_scalar=77"):
        write(base, tmp_path / "written.gguf", "f32")


def test_a_run_is_exported_as_one_file(
    tiny: Callable, train: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny(**{"lora.num_layers": -1, "optimizer.learning_rate": 1e-2}), tmp_path / "run")
    capsys.readouterr()
    assert export.run([str(run), "--to", "gguf", "--type", "q8_0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["folder"] == str(run / "export-gguf-q8_0.gguf")
    check = document["check"]
    assert check["passes"] and 0 < check["deviation"] < 0.1
    assert abs(check["export_loss"] - check["run_loss"]) < 0.02 < check["base_loss"] - check["run_loss"]
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".export")) == []


@pytest.mark.reference
def test_transformers_and_llama_cpp_read_the_files(tmp_path: Path) -> None:
    """Logits by transformers' own reader of GGUF, of the families that it reads whole, and by llama.cpp of all.

    llama-cpp-python is compiled for minutes: who wants it installs it into the reference environment.
    llama.cpp keeps keys and values in 16 bits.
    """
    python = os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    names = [name for name in CASES if name != "gemma2-27b"]
    expected = {}
    for name in names:
        base = model_of(name, tmp_path)
        write(base, tmp_path / f"{name}.gguf", "f32")
        expected[name] = np.array(base.model(IDS))[0]
    script = [python, str(REFERENCE / "gguf_logits.py"), str(tmp_path), *names]
    subprocess.run(script, check=True, capture_output=True, text=True, timeout=900)
    readers: dict[str, Any] = json.loads((tmp_path / "readers.json").read_text())
    assert len([found for found in readers.values() if "transformers" in found]) == 4
    assert len([found for found in readers.values() if "llama_cpp" in found]) in (0, len(names))
    for name, found in readers.items():
        for reader in found:
            logits = np.load(tmp_path / f"{name}-{reader}.npy")
            error = np.abs(logits - expected[name]).max() / np.abs(expected[name]).max()
            assert error < (1e-4 if reader == "transformers" else 1e-2), (name, reader, error)
