"""The bytes of a GGUF tensor as arrays: plain ones as they are, block-quantized ones in MLX's own layout.

Block layouts after ggml's public description. A block holds 32 values of one row:

    Q4_0  scale f16, 16 bytes of nibbles                value = scale * (q - 8)
    Q4_1  scale f16, minimum f16, 16 bytes of nibbles   value = scale * q + minimum
    Q8_0  scale f16, 32 signed bytes                    value = scale * q

where byte i of the nibbles holds value i below and value i + 16 above. MLX's affine quantization stores
`value = scale * q + bias` with unsigned q, groups of 32, packed little end first: the same numbers, reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runner.common.errors import ModelError
from runner.models.gguf.header import BLOCKS, TensorInfo

GROUP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Quantized:
    """An affine-quantized matrix of shape (rows, columns), groups of 32 along the columns.

    `codes` uint8 (rows, columns), one value a byte; `scales` and `biases` float32 (rows, columns / 32).
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int

    def packed(self) -> np.ndarray:
        """MLX's `weight`: uint32 (rows, columns * bits / 32)."""
        codes = self.codes
        if self.bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        return np.ascontiguousarray(codes).view("<u4")

    def dense(self) -> np.ndarray:
        """The values: float32 (rows, columns)."""
        rows, columns = self.codes.shape
        values = self.codes.reshape(rows, -1, GROUP_SIZE).astype(np.float32)
        values *= self.scales[..., None]
        values += self.biases[..., None]
        return values.reshape(rows, columns)

    def rows(self, order: np.ndarray) -> Quantized:
        """The same matrix with its rows in `order`."""
        return Quantized(self.codes[order], self.scales[order], self.biases[order], self.bits)


def read_tensor(path: Path, info: TensorInfo) -> np.ndarray | Quantized:
    """The tensor that `info` describes: float32 or float16 in `info.shape`, or Quantized for a matrix of blocks.

    Raises ModelError where the file has become shorter, where a value or a scale is not finite, and for a
    block-quantized tensor that is not a matrix.
    """
    _, width = BLOCKS[info.kind]
    with path.open("rb") as file:
        file.seek(info.start)
        raw = np.fromfile(file, dtype=np.uint8, count=info.nbytes)
    if raw.size != info.nbytes:
        raise ModelError(f"{path}: tensor {info.name!r} is cut short; fetch the file again.")
    if info.kind in ("F32", "F16", "BF16"):
        return _finite(_plain(raw, info.kind).reshape(info.shape), path, info)
    if len(info.shape) != 2:
        raise ModelError(f"{path}: tensor {info.name!r} is {info.kind} but no matrix: its shape is {info.shape}.")
    rows, columns = info.shape
    blocks = raw.reshape(rows, columns // GROUP_SIZE, width)
    scales = _finite(_halves(blocks, 0), path, info)
    if info.kind == "Q8_0":
        codes = blocks[..., 2:] ^ 0x80
        return Quantized(codes.reshape(rows, columns), scales, scales * -128, 8)
    biases = scales * -8 if info.kind == "Q4_0" else _finite(_halves(blocks, 2), path, info)
    nibbles = blocks[..., -16:]
    codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)
    return Quantized(codes.reshape(rows, columns), scales, biases, 4)


def _plain(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if kind == "F32" else "<f2")


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 (rows, blocks)."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)


def _finite(values: np.ndarray, path: Path, info: TensorInfo) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ModelError(f"{path}: tensor {info.name!r} holds values that are not finite; fetch the file again.")
    return values
