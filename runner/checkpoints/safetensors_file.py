"""Reading and writing safetensors files without copying the data, with a header check that trusts nothing.

Format (safetensors 0.x): eight bytes, little endian, the length N of the header; N bytes of JSON, an object
of ``name: {"dtype", "shape", "data_offsets": [begin, end]}`` and ``"__metadata__"`` (text to text); then the
data, to which the offsets are relative, without hole or overlap.

The bytes are those of the `safetensors` library, with which the tests compare. It does not take its place here because
(version 0.8) its `serialize` and `deserialize` copy all data, which for a checkpoint of 100 MB takes 0.4 s where this
takes a millisecond; it accepts a duplicate key, a header of 100 MB and an axis that MLX cannot count; it cannot check a
header apart from its data; and what `serialize` takes has changed from dicts to raw addresses since version 0.5.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.common import safe_json
from runner.common.errors import CheckpointError, StorageError
from runner.common.filesystem import open_regular
from runner.common.safe_json import quoted
from runner.common.storage_errors import NotRegularFile, os_error_reason
from runner.common.text import shorten

MAX_HEADER = 10_000_000
_MAX_VALUES = 500_000
_MAX_AXES = 64
_MAX_AXIS_LENGTH = 2**31 - 1  # MLX counts in 32 bits
_MAX_NAME_LENGTH = 1000
_MAX_COUNT = 1 << 62
_METADATA = "__metadata__"
_FINITE_CHECK_CHUNK = 1 << 17
"""Elements that are checked together: the intermediate arrays then stay in a core's cache."""

# Types that NumPy lacks (BF16 and the 8-bit floats) are viewed as unsigned integers of the same bits.
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
    """One tensor: `dtype` as safetensors names it ("F32", "BF16"), `data` row-major and little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @classmethod
    def of(cls, array: np.ndarray, dtype: str | None = None) -> Tensor:
        """Return a tensor of the bytes of `array`, which are not copied if it is contiguous and little-endian.

        Args:
            dtype: the type of the elements if NumPy lacks it, such as "BF16" for an array of uint16.

        Raises:
            ValueError: safetensors has no such type, or its size is not that of the elements.
        """
        little = array.dtype.newbyteorder("<")
        name = dtype or _NAMES.get(little)
        if name not in ITEM_BYTES or ITEM_BYTES[name] != little.itemsize:
            raise ValueError(f"an array of {array.dtype} cannot be stored as {name or 'safetensors'}")
        flat = np.ascontiguousarray(array.astype(little, copy=False)).reshape(-1)
        return cls(name, array.shape, flat.view(np.uint8).data if flat.size else b"")

    def array(self) -> np.ndarray:
        """Return a read-only view of `shape`; BF16 and the 8-bit floats as unsigned integers of the same bits."""
        flat = np.frombuffer(self.data, dtype=_NUMPY[self.dtype])
        flat.flags.writeable = False
        return flat.reshape(self.shape)

    def is_finite(self) -> bool:
        """Return whether no element is infinite or NaN; True for integers."""
        flat = self.array().reshape(-1)
        starts = range(0, len(flat), _FINITE_CHECK_CHUNK)
        return all(bool(np.all(self._finite(flat[start : start + _FINITE_CHECK_CHUNK]))) for start in starts)

    def _finite(self, bits: np.ndarray) -> np.ndarray:
        if self.dtype == "BF16":
            return bits & 0x7F80 != 0x7F80
        if self.dtype == "F8_E5M2":
            return bits & 0x7C != 0x7C
        if self.dtype == "F8_E4M3":
            return bits & 0x7F != 0x7F  # this type has NaN but no infinity
        if self.dtype == "F8_E8M0":
            return bits != 0xFF  # a scale: has an exponent only
        return np.isfinite(bits)


@dataclass(frozen=True, slots=True)
class Span:
    """The position of a tensor in a file: bytes `begin` to `end`, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file: those of `pieces`, joined."""
    return b"".join(pieces(tensors, metadata))


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """Return a safetensors file in pieces, which share the memory of the tensors.

    The bytes do not depend on the order of `tensors`.

    Raises:
        ValueError: the data of a tensor does not fit its shape, or `unpack` would refuse the header.
    """
    # Widest elements first, as the library writes them, so that each tensor is aligned to its element size.
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES.get(tensors[name].dtype, 0), name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    data: list[bytes | memoryview] = []
    offset = 0
    for name in order:
        tensor = tensors[name]
        if name == _METADATA:
            raise ValueError(f"a tensor cannot be named {_METADATA}")
        data.append(memoryview(tensor.data).cast("B"))
        end = offset + len(data[-1])
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _parse_header(text, 8 + len(text) + offset)
    return [len(text).to_bytes(8, "little"), text, *data]


def unpack(data: bytes, *, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, as views of `data`, and the metadata of a safetensors file.

    Raises:
        CheckpointError: names `where`, for anything that is not exactly one well-formed file.
    """
    try:
        length = _header_length(data[:8], len(data))
        spans, metadata = _parse_header(data[8 : 8 + length], len(data))
    except ValueError as error:
        raise CheckpointError(f"{where}: not a sound safetensors file: {error}") from None
    view = memoryview(data).toreadonly()
    return {name: Tensor(s.dtype, s.shape, view[s.begin : s.end]) for name, s in spans.items()}, metadata


def require_finite(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise CheckpointError with `where` and the name of the first tensor that contains NaN or Inf."""
    for name, tensor in tensors.items():
        if not tensor.is_finite():
            raise CheckpointError(f"{where}: {shorten(name)} contains NaN or Inf.")


def read_header(path: Path) -> tuple[dict[str, Span], dict[str, str]]:
    """Return the positions of the tensors in the file `path`, and its metadata, from its header and size alone.

    A link is followed: hub caches consist of links.

    Raises:
        CheckpointError: it is missing, not a regular file, or not well-formed.
        StorageError: the machine refuses to read it.
    """
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _parse_header(file.read(_header_length(file.read(8), size)), size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except NotRegularFile as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {os_error_reason(error)}") from error
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


def _parse_header(header: bytes, size: int) -> tuple[dict[str, Span], dict[str, str]]:
    """Return positions and metadata from the header of a file of `size` bytes. Raises ValueError with the reason."""
    if not header.startswith(b"{"):
        raise ValueError("its header does not start with '{'")
    record = safe_json.parse(header, max_values=_MAX_VALUES)
    metadata = record.pop(_METADATA, None)
    if metadata is None:  # MLX writes null where it has none
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of texts")
    start = 8 + len(header)
    spans = {name: _parse_span(name, value, start) for name, value in record.items()}
    end = start
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != end:
            fault = "leaves a hole before it" if span.begin > end else "overlaps another"
            raise ValueError(f"tensor {quoted(name)} {fault} (it begins at byte {span.begin:,})")
        end = span.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, the file at {size:,}")
    return spans, metadata


def _parse_span(name: str, value: object, start: int) -> Span:
    tensor = f"tensor {quoted(name)}"
    if len(name) > _MAX_NAME_LENGTH:
        raise ValueError(f"{tensor} has a name of {len(name):,} characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{tensor} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{tensor} has the unknown dtype {quoted(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"{tensor} has a shape that is not up to {_MAX_AXES} whole numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{tensor} has data_offsets that are not a begin and an end")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if needed >= _MAX_COUNT:
        raise ValueError(f"{tensor} has a shape that overflows")
    if max(shape, default=0) > _MAX_AXIS_LENGTH:
        raise ValueError(f"{tensor} has an axis of {max(shape):,}")
    if needed != offsets[1] - offsets[0]:
        raise ValueError(f"{tensor} needs {needed:,} bytes, its offsets span {offsets[1] - offsets[0]:,}")
    return Span(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_COUNT for item in value)
