"""Decode GGUF tensors: to numpy arrays, or to MLX's quantization layout where that holds the same values.

Five block types fit MLX's affine quantization, which stores `value = scale * code + bias` with unsigned codes in groups
of 32, packed little endian. A block of three of them holds 32 values of one row, after ggml's public description:

    Q4_0  scale f16, 16 bytes of 4-bit codes                value = scale * (code - 8)
    Q4_1  scale f16, minimum f16, 16 bytes of 4-bit codes   value = scale * code + minimum
    Q8_0  scale f16, 32 signed bytes                        value = scale * code

where byte i of the 4-bit codes holds value i in its lower half and value i + 16 in its upper half. The other two are
Q4_K and Q5_K, whose blocks hold eight such groups. Nothing is rounded here: a scale or bias of these needs up to 17
bits, so it is float32 until `load` casts it to the model's dtype. `block_decoders` expands all other block types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from runner.common.errors import ModelError
from runner.models.gguf.block_decoders import SUPER_BLOCK, affine_sub_blocks, dequantize_blocks
from runner.models.gguf.header import BLOCK_SIZES, TensorInfo

GROUP_SIZE = 32
_SUPER_BLOCK_BITS = {"Q4_K": 4, "Q5_K": 5}
_SIMPLE_TYPES = ("Q4_0", "Q4_1", "Q8_0")
AFFINE_TYPES = (*_SIMPLE_TYPES, *_SUPER_BLOCK_BITS)
"""The block types that are kept quantized on request."""
_CHUNK_VALUES = 1 << 19
"""How many values are expanded at once: temporary arrays take some 20 bytes a value and should fit the caches."""


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix (rows, columns), or several (experts, rows, columns), in affine quantization with groups of 32."""

    codes: np.ndarray
    """uint8 (..., rows, columns): one code per byte."""
    scales: np.ndarray
    """float32 (..., rows, columns / 32)."""
    biases: np.ndarray
    """float32 (..., rows, columns / 32)."""
    bits: int

    def pack(self) -> np.ndarray:
        """Return the codes as MLX's `weight`: uint32 (..., rows, columns * bits / 32)."""
        codes = self.codes
        if self.bits == 4:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        elif self.bits == 5:  # 8 codes in 5 bytes
            eight = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8, 1), dtype="<u8")
            for i in range(8):
                eight[..., 0] |= codes[..., i::8].astype("<u8") << np.uint64(5 * i)
            codes = eight.view(np.uint8)[..., :5].reshape(*codes.shape[:-1], -1)
        return np.ascontiguousarray(codes).view("<u4")

    def dequantize(self) -> np.ndarray:
        """Return the values: float32 (..., rows, columns)."""
        values = self.codes.reshape(*self.scales.shape, GROUP_SIZE).astype(np.float32)
        values *= self.scales[..., None]
        values += self.biases[..., None]
        return values.reshape(self.codes.shape)

    def __getitem__(self, rows: np.ndarray) -> QuantizedMatrix:
        """Return the matrix of the given rows, like an array's."""
        return QuantizedMatrix(self.codes[rows], self.scales[rows], self.biases[rows], self.bits)


def read_tensor(path: Path, info: TensorInfo, *, keep_quantized: bool = False) -> np.ndarray | QuantizedMatrix:
    """Return the tensor that `info` describes: float32 or float16 of shape `info.shape`, or a quantized matrix.

    Q4_K and Q5_K are a quantized matrix only if `keep_quantized`: expanding them at once takes less memory.

    Raises:
        ModelError: the file was truncated meanwhile, a value or scale is NaN or Inf, or a block-quantized tensor is
            not a matrix.
    """
    with path.open("rb") as file:
        file.seek(info.start)
        if info.type_name in ("F32", "F16", "BF16"):
            raw = _read_bytes(file, info.nbytes, path, info)
            return _require_finite(_decode_plain(raw, info.type_name).reshape(info.shape), path, info)
        if len(info.shape) not in (2, 3):
            raise ModelError(
                f"{path}: tensor {info.name!r} is {info.type_name} but not a matrix: its shape is {info.shape}."
            )
        if info.type_name in _SUPER_BLOCK_BITS and keep_quantized:
            return _decode_super_blocks(file, path, info)
        if info.type_name in _SIMPLE_TYPES:
            return _decode_affine(_read_bytes(file, info.nbytes, path, info), path, info)
        return _expand(file, path, info)


def _read_bytes(file: BinaryIO, count: int, path: Path, info: TensorInfo) -> np.ndarray:
    raw = np.fromfile(file, dtype=np.uint8, count=count)
    if raw.size != count:
        raise ModelError(f"{path}: tensor {info.name!r} is truncated; download the file again.")
    return raw


def _expand(file: BinaryIO, path: Path, info: TensorInfo) -> np.ndarray:
    """Return the values of a block-quantized tensor, expanded in pieces so that only the result is large."""
    block_values, block_bytes = BLOCK_SIZES[info.type_name]
    values = np.empty((math.prod(info.shape) // block_values, block_values), dtype=np.float32)
    step = _CHUNK_VALUES // block_values
    for start in range(0, len(values), step):
        piece = values[start : start + step]
        blocks = _read_bytes(file, len(piece) * block_bytes, path, info).reshape(-1, block_bytes)
        with np.errstate(all="ignore"):  # a damaged scale of NaN or Inf is refused below
            piece[:] = dequantize_blocks(info.type_name, blocks)
        _require_finite(piece, path, info)
    return values.reshape(info.shape)


def _decode_affine(raw: np.ndarray, path: Path, info: TensorInfo) -> QuantizedMatrix:
    *rows, columns = info.shape
    _, block_bytes = BLOCK_SIZES[info.type_name]
    blocks = raw.reshape(*rows, columns // GROUP_SIZE, block_bytes)
    scales = _require_finite(_float16_at(blocks, 0), path, info)
    if info.type_name == "Q8_0":
        codes = blocks[..., 2:] ^ 0x80  # signed to unsigned: adds 128
        return QuantizedMatrix(codes.reshape(info.shape), scales, scales * -128, 8)
    biases = scales * -8 if info.type_name == "Q4_0" else _require_finite(_float16_at(blocks, 2), path, info)
    packed = blocks[..., -16:]
    codes = np.concatenate([packed & 0x0F, packed >> 4], axis=-1)
    return QuantizedMatrix(codes.reshape(info.shape), scales, biases, 4)


def _decode_super_blocks(file: BinaryIO, path: Path, info: TensorInfo) -> QuantizedMatrix:
    """Return the quantized matrix of a Q4_K or Q5_K tensor, decoded in pieces so that only the result is large."""
    block_bytes = BLOCK_SIZES[info.type_name][1]
    count, groups = math.prod(info.shape) // SUPER_BLOCK, SUPER_BLOCK // GROUP_SIZE
    codes = np.empty((count, SUPER_BLOCK), dtype=np.uint8)
    scales, minima = np.empty((2, count, groups), dtype=np.float32)
    step = _CHUNK_VALUES // SUPER_BLOCK
    for start in range(0, count, step):
        piece = slice(start, min(start + step, count))
        blocks = _read_bytes(file, (piece.stop - start) * block_bytes, path, info).reshape(-1, block_bytes)
        with np.errstate(all="ignore"):  # a damaged scale of NaN or Inf is refused below
            codes[piece], scales[piece], minima[piece] = affine_sub_blocks(info.type_name, blocks)
        _require_finite(scales[piece], path, info)
        _require_finite(minima[piece], path, info)
    *rows, columns = info.shape
    scales, biases = (array.reshape(*rows, columns // GROUP_SIZE) for array in (scales, -minima))
    return QuantizedMatrix(codes.reshape(info.shape), scales, biases, _SUPER_BLOCK_BITS[info.type_name])


def _decode_plain(raw: np.ndarray, type_name: str) -> np.ndarray:
    if type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if type_name == "F32" else "<f2")


def _float16_at(blocks: np.ndarray, offset: int) -> np.ndarray:
    """Return the float16 at byte `offset` of each block as float32 (..., rows, blocks)."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0].astype(np.float32)


def _require_finite(values: np.ndarray, path: Path, info: TensorInfo) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ModelError(f"{path}: tensor {info.name!r} contains NaN or Inf; download the file again.")
    return values
