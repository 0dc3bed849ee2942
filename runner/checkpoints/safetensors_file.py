"""The bytes of a safetensors file and back, with a header check that trusts nothing.

Format (safetensors 0.x): eight bytes, little endian, the length N of the header; N bytes of JSON, an object
of ``name: {"dtype", "shape", "data_offsets": [begin, end]}`` and ``"__metadata__"`` (text to text); then the
data, to which the offsets are relative, without hole or overlap.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.common import safe_json
from runner.common.errors import CheckpointError, StorageError
from runner.common.safe_json import quoted

MAX_HEADER = 10_000_000
_MOST_VALUES = 500_000
_MOST_AXES = 64
_LONGEST_AXIS = 2**31 - 1  # MLX counts in 32 bits
_LONGEST_NAME = 1000
_LARGEST = 1 << 62
_METADATA = "__metadata__"
_LOOK = 1 << 17
"""Numbers looked at together: what is made of them stays in a core's cache."""

# Types that numpy lacks (BF16 and the 8-bit floats) are seen as unsigned integers of their bits.
_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "I32": "<i4", "F32": "<f4",
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
ITEM_BYTES = {name: np.dtype(code).itemsize for name, code in _NUMPY.items()}
_AS_BITS = ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")
_NAMES = {np.dtype(code): name for name, code in _NUMPY.items() if name not in _AS_BITS}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: `dtype` as safetensors names it ("F32", "BF16"), row-major little-endian `data`."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @classmethod
    def of(cls, array: np.ndarray, dtype: str | None = None) -> Tensor:
        """`array`'s bytes, not copied where they lie in row-major order; "BF16" as `dtype` for its uint16 bits.

        Raises ValueError where safetensors has no such type or the item size is another.
        """
        little = array.dtype.newbyteorder("<")
        name = dtype or _NAMES.get(little)
        if name not in ITEM_BYTES or ITEM_BYTES[name] != little.itemsize:
            raise ValueError(f"an array of {array.dtype} cannot be stored as {name or 'safetensors'}")
        flat = np.ascontiguousarray(array.astype(little, copy=False)).reshape(-1)
        return cls(name, array.shape, flat.view(np.uint8).data if flat.size else b"")

    def array(self) -> np.ndarray:
        """A read-only view in `shape`; BF16 and the 8-bit floats as unsigned integers of their bits."""
        flat = np.frombuffer(self.data, dtype=_NUMPY[self.dtype])
        flat.flags.writeable = False
        return flat.reshape(self.shape)

    def is_finite(self) -> bool:
        """Whether no element is infinite or NaN; True for integers."""
        bits = self.array().reshape(-1)
        return all(bool(np.all(self._finite(bits[at : at + _LOOK]))) for at in range(0, len(bits), _LOOK))

    def _finite(self, bits: np.ndarray) -> np.ndarray:
        if self.dtype == "BF16":
            return bits & 0x7F80 != 0x7F80
        if self.dtype == "F8_E5M2":
            return bits & 0x7C != 0x7C
        if self.dtype == "F8_E4M3":
            return bits & 0x7F != 0x7F  # this type has NaN but no infinity
        if self.dtype == "F8_E8M0":
            return bits != 0xFF  # a scale: an exponent alone
        return np.isfinite(bits)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor lies in a file: bytes `begin` to `end`, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of `pieces` in one."""
    return b"".join(pieces(tensors, metadata))


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """A safetensors file in pieces, the tensors' own memory among them: nothing of it is copied.

    The same bytes for the same tensors, in whatever order they come.

    Raises ValueError where a tensor's data does not fit its shape, or `unpack` would refuse the header.
    """
    # Widest items first, as the format's own writer does, so that each tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES.get(tensors[name].dtype, 0), name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    parts: list[bytes | memoryview] = []
    at = 0
    for name in order:
        tensor = tensors[name]
        data = memoryview(tensor.data).cast("B")
        if name == _METADATA:
            raise ValueError(f"a tensor cannot be named {_METADATA}")
        end = at + len(data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        parts.append(data)
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _spans(text, 8 + len(text) + at)
    return [len(text).to_bytes(8, "little"), text, *parts]


def unpack(data: bytes, *, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (views into `data`, no copies) and the metadata of a safetensors file.

    Raises CheckpointError, naming `where`, for anything that is not exactly one well-formed file.
    """
    try:
        length = _header_length(data[:8], len(data))
        spans, metadata = _spans(data[8 : 8 + length], len(data))
    except ValueError as error:
        raise CheckpointError(f"{where}: not a sound safetensors file: {error}") from None
    view = memoryview(data).toreadonly()
    found = {name: Tensor(at.dtype, at.shape, view[at.begin : at.end]) for name, at in spans.items()}
    return found, metadata


def read_header(path: Path) -> tuple[dict[str, Span], dict[str, str]]:
    """What the file `path` holds, from its header and size alone; a link is followed, as hub caches use them.

    Raises CheckpointError as `unpack` does, or where it is missing or not a regular file; StorageError where
    the machine refuses to read it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            with open(handle, "rb", closefd=False) as file:
                length = _header_length(file.read(8), status.st_size)
                return _spans(file.read(length), status.st_size)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a sound safetensors file: {error}") from None


def _header_length(prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise ValueError(f"{size} bytes are too few")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header would have {length:,} bytes; at most {MAX_HEADER:,} are read")
    if length > size - 8:
        raise ValueError(f"its header would have {length:,} bytes, the file has {size:,}")
    return length


def _spans(header: bytes, size: int) -> tuple[dict[str, Span], dict[str, str]]:
    """The checked header of a file of `size` bytes. Raises ValueError with the reason."""
    if not header.startswith(b"{"):
        raise ValueError("its header does not start with '{'")
    record = safe_json.parse(header, most_values=_MOST_VALUES)
    metadata = record.pop(_METADATA, None)
    if metadata is None:  # MLX writes null where it has none
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of texts")
    start = 8 + len(header)
    spans = {name: _span(name, value, start) for name, value in record.items()}
    at = start
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != at:
            what = "leaves a hole before it" if span.begin > at else "overlaps another"
            raise ValueError(f"tensor {quoted(name)} {what} (it begins at byte {span.begin:,})")
        at = span.end
    if at != size:
        raise ValueError(f"its tensors end at byte {at:,}, the file at {size:,}")
    return spans, metadata


def _span(name: str, value: object, start: int) -> Span:
    tensor = f"tensor {quoted(name)}"
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"{tensor} has a name of {len(name):,} characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{tensor} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{tensor} has the unknown dtype {quoted(dtype)}")
    if not _are_counts(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"{tensor} has a shape that is not up to {_MOST_AXES} whole numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{tensor} has data_offsets that are not a begin and an end")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if needed >= _LARGEST:
        raise ValueError(f"{tensor} has a shape that overflows")
    if max(shape, default=0) > _LONGEST_AXIS:
        raise ValueError(f"{tensor} has an axis of {max(shape):,}")
    if needed != offsets[1] - offsets[0]:
        raise ValueError(f"{tensor} needs {needed:,} bytes, its offsets span {offsets[1] - offsets[0]:,}")
    return Span(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _LARGEST for item in value)
