"""Decode GGUF tensors: plain ones to numpy arrays, block-quantized ones to MLX's quantization layout.

Block layouts, after ggml's public description. A block holds 32 values of one row:

    Q4_0  scale f16, 16 bytes of 4-bit codes                value = scale * (code - 8)
    Q4_1  scale f16, minimum f16, 16 bytes of 4-bit codes   value = scale * code + minimum
    Q8_0  scale f16, 32 signed bytes                        value = scale * code

where byte i of the 4-bit codes holds value i in its lower half and value i + 16 in its upper half. MLX's affine
quantization stores `value = scale * code + bias` with unsigned codes in groups of 32, packed little endian. The same
values fit both layouts, so nothing is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runner.common.errors import ModelError
from runner.models.gguf.header import BLOCK_SIZES, TensorInfo

GROUP_SIZE = 32


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix (rows, columns) in affine quantization with groups of 32 columns."""

    codes: np.ndarray
    """uint8 (rows, columns): one code per byte."""
    scales: np.ndarray
    """float32 (rows, columns / 32)."""
    biases: np.ndarray
    """float32 (rows, columns / 32)."""
    bits: int

    def pack(self) -> np.ndarray:
        """Return the codes as MLX's `weight`: uint32 (rows, columns * bits / 32)."""
        codes = self.codes
        if self.bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        return np.ascontiguousarray(codes).view("<u4")

    def dequantize(self) -> np.ndarray:
        """Return the values: float32 (rows, columns)."""
        rows, columns = self.codes.shape
        values = self.codes.reshape(rows, -1, GROUP_SIZE).astype(np.float32)
        values *= self.scales[..., None]
        values += self.biases[..., None]
        return values.reshape(rows, columns)

    def __getitem__(self, rows: np.ndarray) -> QuantizedMatrix:
        """Return the matrix of the given rows, like an array's."""
        return QuantizedMatrix(self.codes[rows], self.scales[rows], self.biases[rows], self.bits)


def read_tensor(path: Path, info: TensorInfo) -> np.ndarray | QuantizedMatrix:
    """Return the tensor that `info` describes: float32 or float16 of shape `info.shape`, or a quantized matrix.

    Raises:
        ModelError: the file was truncated meanwhile, a value or scale is NaN or Inf, or a block-quantized tensor is
            not a matrix.
    """
    with path.open("rb") as file:
        file.seek(info.start)
        raw = np.fromfile(file, dtype=np.uint8, count=info.nbytes)
    if raw.size != info.nbytes:
        raise ModelError(f"{path}: tensor {info.name!r} is truncated; download the file again.")
    if info.type_name in ("F32", "F16", "BF16"):
        return _require_finite(_decode_plain(raw, info.type_name).reshape(info.shape), path, info)
    if len(info.shape) != 2:
        raise ModelError(
            f"{path}: tensor {info.name!r} is {info.type_name} but not a matrix: its shape is {info.shape}."
        )
    rows, columns = info.shape
    _, block_bytes = BLOCK_SIZES[info.type_name]
    blocks = raw.reshape(rows, columns // GROUP_SIZE, block_bytes)
    scales = _require_finite(_float16_at(blocks, 0), path, info)
    if info.type_name == "Q8_0":
        codes = blocks[..., 2:] ^ 0x80  # signed to unsigned: adds 128
        return QuantizedMatrix(codes.reshape(rows, columns), scales, scales * -128, 8)
    biases = scales * -8 if info.type_name == "Q4_0" else _require_finite(_float16_at(blocks, 2), path, info)
    packed = blocks[..., -16:]
    codes = np.concatenate([packed & 0x0F, packed >> 4], axis=-1)
    return QuantizedMatrix(codes.reshape(rows, columns), scales, biases, 4)


def _decode_plain(raw: np.ndarray, type_name: str) -> np.ndarray:
    if type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if type_name == "F32" else "<f2")


def _float16_at(blocks: np.ndarray, offset: int) -> np.ndarray:
    """Return the float16 at byte `offset` of each block as float32 (rows, blocks)."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0].astype(np.float32)


def _require_finite(values: np.ndarray, path: Path, info: TensorInfo) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ModelError(f"{path}: tensor {info.name!r} contains NaN or Inf; download the file again.")
    return values
