"""Every block type expands to the values of an independent implementation, in bounded memory.

The reference is reference/gguf_blocks.json: random blocks and the values that the `gguf` package expands them to,
written by reference/make_gguf_blocks.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.common.errors import ModelError
from runner.models.gguf import blocks
from runner.models.gguf.blocks import QuantizedMatrix, read_tensor
from runner.models.gguf.header import BLOCK_SIZES, read_header

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "gguf_blocks.json").read_text())["types"]


def test_the_reference_covers_every_block_type() -> None:
    assert REFERENCE.keys() == BLOCK_SIZES.keys() - {"F32", "F16", "BF16"}


def write_tensor(gguf_files: ModuleType, path: Path, type_name: str, shape: tuple[int, ...], raw: bytes) -> Path:
    return gguf_files.GgufFile({}, {"t": (type_name, shape, raw)}).write(path)


def read_values(path: Path) -> np.ndarray:
    tensor = read_tensor(path, read_header(path).tensors["t"])
    return tensor.dequantize() if isinstance(tensor, QuantizedMatrix) else tensor


@pytest.mark.parametrize("type_name", REFERENCE)
def test_each_block_type_expands_to_the_values_of_the_gguf_package(
    gguf_files: ModuleType, tmp_path: Path, type_name: str
) -> None:
    raw = bytes.fromhex(REFERENCE[type_name]["blocks"])
    expected = np.frombuffer(bytes.fromhex(REFERENCE[type_name]["values"]), dtype="<f4").reshape(2, -1)
    values = read_values(write_tensor(gguf_files, tmp_path / "a.gguf", type_name, expected.shape, raw))
    np.testing.assert_array_equal(values, expected)
    three = read_values(write_tensor(gguf_files, tmp_path / "b.gguf", type_name, (2, 1, expected.shape[1]), raw))
    np.testing.assert_array_equal(three[:, 0], values)


@pytest.mark.parametrize("type_name", blocks.AFFINE_TYPES)
def test_a_block_type_that_is_kept_quantized_has_the_same_values_in_mlx(
    gguf_files: ModuleType, tmp_path: Path, type_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = bytes.fromhex(REFERENCE[type_name]["blocks"])
    expected = np.frombuffer(bytes.fromhex(REFERENCE[type_name]["values"]), dtype="<f4").reshape(2, -1)
    path = write_tensor(gguf_files, tmp_path / "a.gguf", type_name, (6, expected.shape[1]), raw * 3)
    monkeypatch.setattr(blocks, "_CHUNK_VALUES", 4 * 256)  # pieces of 4 and 2 blocks
    matrix = read_tensor(path, read_header(path).tensors["t"], keep_quantized=True)
    assert isinstance(matrix, QuantizedMatrix)
    arrays = [mx.array(array) for array in (matrix.pack(), matrix.scales, matrix.biases)]
    values = mx.dequantize(*arrays, group_size=32, bits=matrix.bits)
    np.testing.assert_array_equal(np.array(values), np.tile(expected, (3, 1)))
    inputs = mx.random.normal((4, expected.shape[1]), key=mx.random.key(0))
    products = mx.quantized_matmul(inputs, *arrays, transpose=True, group_size=32, bits=matrix.bits)
    np.testing.assert_allclose(
        np.array(products), np.array(inputs @ values.T), rtol=0, atol=1e-5 * np.abs(expected).sum(1).max()
    )


@pytest.mark.parametrize("type_name", ["Q4_K", "Q5_K"])
def test_a_kept_block_whose_scale_is_nan_is_refused(gguf_files: ModuleType, tmp_path: Path, type_name: str) -> None:
    path = write_tensor(gguf_files, tmp_path / "a.gguf", type_name, (1, 256), b"\xff" * BLOCK_SIZES[type_name][1])
    with pytest.raises(ModelError, match="tensor 't' contains NaN or Inf"):
        read_tensor(path, read_header(path).tensors["t"], keep_quantized=True)


def test_a_tensor_expanded_in_pieces_is_the_same_tensor(
    gguf_files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = bytes.fromhex(REFERENCE["Q6_K"]["blocks"]) * 3
    path = write_tensor(gguf_files, tmp_path / "a.gguf", "Q6_K", (3, 512), raw)
    whole = read_values(path)
    monkeypatch.setattr(blocks, "_CHUNK_VALUES", 4 * 256)  # pieces of 4 and 2 blocks
    np.testing.assert_array_equal(read_values(path), whole)


@pytest.mark.parametrize("type_name", REFERENCE)
def test_a_block_whose_scale_is_nan_is_refused(gguf_files: ModuleType, tmp_path: Path, type_name: str) -> None:
    block_values, block_bytes = BLOCK_SIZES[type_name]
    path = write_tensor(gguf_files, tmp_path / "a.gguf", type_name, (1, block_values), b"\xff" * block_bytes)
    with pytest.raises(ModelError, match="tensor 't' contains NaN or Inf"):
        read_values(path)


def test_a_file_truncated_after_its_header_was_read_is_refused(gguf_files: ModuleType, tmp_path: Path) -> None:
    path = write_tensor(gguf_files, tmp_path / "a.gguf", "Q4_K", (2, 256), bytes(288))
    info = read_header(path).tensors["t"]
    path.write_bytes(path.read_bytes()[: info.start + 287])
    with pytest.raises(ModelError, match="tensor 't' is truncated"):
        read_tensor(path, info)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["gguf_blocks", "sentencepiece"])
def test_the_reference_can_be_reproduced(name: str) -> None:
    folder = Path(__file__).parent / "reference"
    # SentencePiece is among mlx-lm's own requirements; the gguf package is not.
    python = sys.executable if name == "sentencepiece" else os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    command = [python, str(folder / f"make_{name}.py")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    again, recorded = json.loads(done.stdout), json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    for key in ("types", "models"):
        assert again.get(key) == recorded.get(key)
