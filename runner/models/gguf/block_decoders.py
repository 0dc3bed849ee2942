"""Expand the block types that store sub-block scales or a code book: float32 values from raw blocks.

Block layouts, after ggml's public description. A super-block holds 256 values of one row, in sub-blocks of 16 or 32
that have a scale (and a minimum) of their own; `d` and `dmin` are float16 and scale those.

    Q5_0    d, 4 bytes of fifth bits, 16 bytes of lower 4 bits      value = d * (code - 16)
    Q5_1    d, minimum f16, 4 bytes, 16 bytes                       value = d * code + minimum
    IQ4_NL  d, 16 bytes of 4-bit indices                            value = d * IQ4_VALUES[index]
    IQ4_XS  d, 8 scales of 6 bits, 128 bytes of 4-bit indices       value = d * (scale - 32) * IQ4_VALUES[index]
    Q2_K    16 scales and minima of 4 bits, 64 bytes, d, dmin       value = d * scale * code - dmin * minimum
    Q3_K    32 bytes of third bits, 64 bytes, 16 scales of 6 bits, d   value = d * (scale - 32) * (code - 4)
    Q4_K    d, dmin, 8 scales and minima of 6 bits, 128 bytes       value = d * scale * code - dmin * minimum
    Q5_K    d, dmin, 8 scales and minima, 32 bytes of fifth bits, 128 bytes   the same
    Q6_K    128 bytes of lower 4 bits, 64 of upper 2, 16 signed scales, d     value = d * scale * (code - 32)

The operations are those of ggml's reference in its order, in float32, so the values are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SUPER_BLOCK = 256

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
"""The code book of IQ4_NL and IQ4_XS."""


def dequantize_blocks(type_name: str, blocks: np.ndarray) -> np.ndarray:
    """Return the values of raw blocks, uint8 (blocks, bytes per block): float32 (blocks, values per block).

    The values are NaN or Inf where a block's own scale is.
    """
    return _DECODERS[type_name](blocks)


def _float16(blocks: np.ndarray, offset: int) -> np.ndarray:
    """Return the float16 at byte `offset` of each block as float32 (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _fields(packed: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Return the fields of `bits` bits in `packed`, uint8 (blocks, bytes): uint8 (blocks, bytes * 8 / bits).

    Within each `group` bytes, all lowest fields come first, then those above them.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    spread = packed.reshape(len(packed), -1, 1, group) >> shifts
    return (spread & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _bits(packed: np.ndarray) -> np.ndarray:
    """Return the bits of each byte in order, least significant first: uint8 (blocks, bytes * 8)."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _scaled(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None = None) -> np.ndarray:
    """Return `scale * code - minimum` for each sub-block: float32 (blocks, values)."""
    values = codes.reshape(*scales.shape, -1).astype(np.float32)
    values *= scales[..., None]
    if minima is not None:
        values -= minima[..., None]
    return values.reshape(len(codes), -1)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    codes = _fields(blocks[:, 6:], 4, 16) | _bits(blocks[:, 2:6]) << 4
    return _scaled(codes.astype(np.int8) - np.int8(16), _float16(blocks, 0))


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    codes = _fields(blocks[:, 8:], 4, 16) | _bits(blocks[:, 4:8]) << 4
    return _scaled(codes, _float16(blocks, 0)) + _float16(blocks, 2)


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _scaled(IQ4_VALUES[_fields(blocks[:, 2:], 4, 16)], _float16(blocks, 0))


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    lower = _fields(blocks[:, 4:8], 4, 1)
    scales = (lower | (upper & 3).astype(np.uint8) << 4).astype(np.int8) - np.int8(32)
    return _scaled(IQ4_VALUES[_fields(blocks[:, 8:], 4, 16)], _float16(blocks, 0) * scales.astype(np.float32))


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, :16]
    scales = _float16(blocks, 80) * (packed & 15).astype(np.float32)
    minima = _float16(blocks, 82) * (packed >> 4).astype(np.float32)
    return _scaled(_fields(blocks[:, 16:80], 2, 32), scales, minima)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    scales = (_fields(blocks[:, 96:104], 4, 8) | _fields(blocks[:, 104:108], 2, 4) << 4).astype(np.int8) - np.int8(32)
    # The code is 4 less where its third bit is not set.
    codes = (_fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2).astype(np.int8) - np.int8(4)
    return _scaled(codes, _float16(blocks, 108) * scales.astype(np.float32))


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales and minima of the 8 sub-blocks of Q4_K and Q5_K: float32 (blocks, 8) each.

    Of 12 bytes, the first 4 hold the scales 0 to 3 in their lower 6 bits, the next 4 the minima 0 to 3, and the last 4
    the lower 4 bits of scales and minima 4 to 7, whose upper 2 bits are the upper bits of the first 8 bytes.
    """
    first, second, last = np.split(blocks[:, 4:16], 3, axis=-1)
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=-1)
    return _float16(blocks, 0) * scales.astype(np.float32), _float16(blocks, 2) * minima.astype(np.float32)


def affine_sub_blocks(type_name: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scales and minima of raw Q4_K or Q5_K blocks: uint8 (blocks, 256), float32 (blocks, 8) twice."""
    if type_name == "Q4_K":
        codes = _fields(blocks[:, 16:], 4, 32)
    else:
        codes = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4
    return codes, *_scales_and_minima(blocks)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    codes = (_fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _scaled(codes, _float16(blocks, 208) * scales)


_DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": lambda blocks: _scaled(*affine_sub_blocks("Q4_K", blocks)),
    "Q5_K": lambda blocks: _scaled(*affine_sub_blocks("Q5_K", blocks)),
    "Q6_K": _q6_k,
}
