"""Read a GGUF header strictly and within bounds, before anything that it claims is relied on.

The layout follows the public GGUF specification (versions 2 and 3, little endian): magic, version, counts, key/value
pairs, tensor descriptions, padding, tensor data. Every count, length, offset and size is checked against the bytes
that the file has, so a truncated or hostile file ends in a ModelError. The `gguf` package's reader checks none of
them: it loops over a claimed count of 2^60 and accepts overlapping tensors.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from runner.common.errors import ModelError, shorten

T = TypeVar("T")

MAX_HEADER_BYTES = 24 << 20
"""A vocabulary of 260,000 tokens with its merges takes about 15 MB."""
MAX_STRINGS = 700_000
"""The most strings in all arrays together."""
MAX_ENTRIES = 65_536
"""The most key/value pairs, and the most tensors."""
MAX_DIMENSIONS = 4

Value = bool | int | float | str | list[str] | np.ndarray

_SCALAR_FORMATS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

BLOCK_SIZES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
"""The supported ggml types: name to (values per block, bytes per block)."""

_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The description of one tensor; `start` is in bytes from the beginning of the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    """The slowest dimension first, unlike in the file."""
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All metadata by key, and all tensors by name."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


class MetadataSection:
    """Typed access to the metadata whose keys begin with `prefix`."""

    prefix = ""

    def __init__(self, path: Path, metadata: dict[str, Value]) -> None:
        self.path, self.metadata = path, metadata

    def get(self, key: str, expected: type[T], default: T | None = None) -> T | None:
        """Return the value of `key`, checked to be of the `expected` type, or `default` if there is none."""
        value: object = self.metadata.get(f"{self.prefix}.{key}", default)
        # The exact type: a bool is refused where an int is expected.
        if value is None or (isinstance(value, expected) and type(value) is expected):
            return value
        actual = "a list" if isinstance(value, list | np.ndarray) else shorten(repr(value), 80)
        raise ModelError(f"{self.path}: '{self.prefix}.{key}' is {actual}, where one {expected.__name__} is supported.")


def read_header(path: Path) -> Header:
    """Read and check the header of the GGUF file at `path`, in under a second and 200 MB whatever it contains.

    Raises:
        ModelError: the file is missing, truncated or malformed, or has a tensor of a type not in `BLOCK_SIZES`.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file. Set model.path to a GGUF file, a folder or a hub id.")
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            buffer = file.read(min(file_size, MAX_HEADER_BYTES))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    return _HeaderReader(path, buffer, file_size).read()


class _HeaderReader:
    """A cursor over the header's bytes that never moves past their end."""

    def __init__(self, path: Path, buffer: bytes, file_size: int) -> None:
        self.path, self.buffer, self.file_size = path, buffer, file_size
        self.position = 0
        self.string_count = 0

    def error(self, reason: str) -> ModelError:
        return ModelError(f"{self.path}: not a usable GGUF file: {reason}.")

    def read(self) -> Header:
        start = self._advance(4, "the magic number")
        magic = self.buffer[start : start + 4]
        if magic != b"GGUF":
            raise self.error(f"it begins with {magic!r}, not with b'GGUF'")
        version = self._scalar("<I", "the version")
        if version not in (2, 3):
            endianness = "; it is big endian" if version in (2 << 24, 3 << 24) else ""
            raise self.error(f"version {version} is not supported (only 2 and 3, little endian){endianness}")
        tensor_count = self._count("tensors")
        key_count = self._count("metadata keys")
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self._string("a metadata key")
            if key in metadata:
                raise self.error(f"the metadata key {key[:80]!r} appears twice")
            metadata[key] = self._value(f"the value of {key[:80]!r}")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {shorten(repr(alignment))}, not a power of two of 8 or more")
        described = [self._tensor() for _ in range(tensor_count)]
        data_start = -(-self.position // alignment) * alignment
        return Header(metadata, self._locate(described, data_start, alignment))

    def _advance(self, count: int, what: str) -> int:
        """Move forward by `count` bytes and return where they begin; `what` names them in an error."""
        start = self.position
        if count > len(self.buffer) - start:
            if start + count > self.file_size:
                raise self.error(
                    f"{what} at byte {start} needs {count} bytes, past the end of the file ({self.file_size} bytes);"
                    " it is truncated or damaged, download it again"
                )
            raise self.error(f"its header is larger than {MAX_HEADER_BYTES >> 20} MB, at {what}")
        self.position = start + count
        return start

    def _scalar(self, format: str, what: str) -> int | float:
        return struct.unpack_from(format, self.buffer, self._advance(struct.calcsize(format), what))[0]

    def _count(self, what: str) -> int:
        count = int(self._scalar("<Q", f"the number of {what}"))
        if count > MAX_ENTRIES:
            raise self.error(f"it claims {count} {what} (at most {MAX_ENTRIES} are accepted)")
        return count

    def _string(self, what: str) -> str:
        length = int(self._scalar("<Q", what))
        start = self._advance(length, what)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {start} is not UTF-8") from None

    def _value(self, what: str) -> Value:
        type_number = int(self._scalar("<I", what))
        if type_number == _STRING:
            return self._string(what)
        if type_number == _BOOL:
            byte = self._scalar("<B", what)
            if byte > 1:
                raise self.error(f"{what} is a boolean of {byte}")
            return bool(byte)
        if type_number in _SCALAR_FORMATS:
            return self._scalar(_SCALAR_FORMATS[type_number], what)
        if type_number == _ARRAY:
            return self._array(what)
        raise self.error(f"{what} has the unknown type {type_number}")

    def _array(self, what: str) -> list[str] | np.ndarray:
        type_number = int(self._scalar("<I", what))
        count = int(self._scalar("<Q", what))
        if type_number == _STRING:
            self.string_count += count
            if self.string_count > MAX_STRINGS:
                raise self.error(f"{what} brings its arrays to {self.string_count} strings (at most {MAX_STRINGS})")
            return [self._string(what) for _ in range(count)]
        if type_number == _ARRAY:
            raise self.error(f"{what} is an array of arrays, which is not supported")
        format = "<u1" if type_number == _BOOL else _SCALAR_FORMATS.get(type_number)
        if format is None:
            raise self.error(f"{what} is an array of the unknown type {type_number}")
        dtype = np.dtype(format)
        start = self._advance(count * dtype.itemsize, what)
        return np.frombuffer(self.buffer, dtype=dtype, count=count, offset=start)

    def _tensor(self) -> TensorInfo:
        """Return the next tensor's description, `start` still relative to the tensor data."""
        name = self._string("a tensor's name")
        what = f"the description of tensor {name[:80]!r}"
        dimensions = int(self._scalar("<I", what))
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.error(f"tensor {name[:80]!r} has {dimensions} dimensions (1 to {MAX_DIMENSIONS})")
        shape = tuple(int(self._scalar("<Q", what)) for _ in range(dimensions))[::-1]
        type_number = int(self._scalar("<I", what))
        offset = int(self._scalar("<Q", what))
        type_name = _TYPE_NAMES.get(type_number, f"number {type_number}")
        if type_name not in BLOCK_SIZES:
            raise ModelError(
                f"{self.path}: tensor {name[:80]!r} is of ggml type {type_name}, which is not supported"
                f" (supported: {', '.join(BLOCK_SIZES)}). Use a file of one of these, such as Q4_K_M or Q8_0, or the"
                " safetensors of the same model."
            )
        block_values, block_bytes = BLOCK_SIZES[type_name]
        if not all(shape) or shape[-1] % block_values:
            raise self.error(f"tensor {name[:80]!r} of type {type_name} has the invalid shape {shape}")
        return TensorInfo(name, type_name, shape, offset, math.prod(shape) // block_values * block_bytes)

    def _locate(self, described: list[TensorInfo], data_start: int, alignment: int) -> dict[str, TensorInfo]:
        """Return each tensor with its start in the file, checked to be aligned, inside the file and not to overlap."""
        tensors: dict[str, TensorInfo] = {}
        for info in described:
            if info.name in tensors:
                raise self.error(f"tensor {info.name[:80]!r} appears twice")
            start = data_start + info.start
            if info.start % alignment or start + info.nbytes > self.file_size:
                raise self.error(
                    f"tensor {info.name[:80]!r} at byte {start} needs {info.nbytes} bytes: past the end of"
                    f" the file ({self.file_size} bytes) or not aligned; it is truncated or damaged, download it again"
                )
            tensors[info.name] = replace(info, start=start)
        end, previous = data_start, ""
        for info in sorted(tensors.values(), key=lambda tensor: tensor.start):
            if info.start < end:
                raise self.error(f"tensors {previous[:80]!r} and {info.name[:80]!r} overlap")
            end, previous = info.start + info.nbytes, info.name
        return tensors
