"""The GGUF header, read strictly and within bounds: what a file says it holds, before any of it is believed.

Layout after the public GGUF specification (versions 2 and 3, little endian): magic, version, counts, key/value
pairs, tensor descriptions, padding, tensor data. Every count, length, offset and size is checked against the
bytes that are there, so that a truncated or hostile file ends in one sentence instead of in a C parser.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runner.common.errors import ModelError
from runner.common.text import shorten

HEADER_LIMIT = 24 << 20
"""Most bytes a header may take. A vocabulary of 260 000 tokens with its merges takes about 15 MB."""
STRING_LIMIT = 700_000
"""Most strings in all arrays together."""
COUNT_LIMIT = 65_536
"""Most key/value pairs, and most tensors."""
DIMENSION_LIMIT = 4

Value = bool | int | float | str | list[str] | np.ndarray

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34)}
"""The ggml types that can be read: name to (values a block, bytes a block)."""

_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `shape` slowest dimension first, `start` in bytes from the file's beginning."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All metadata by key, and all tensors by name."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read and check the header of the GGUF file at `path`.

    Raises ModelError, naming file and reason, for anything that is not a whole, well-formed file whose tensors
    are all of a type in `BLOCKS`. Takes under a second and under 200 MB whatever the file holds.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file. Give model.path a GGUF file, a folder or a hub id.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            buffer = file.read(min(size, HEADER_LIMIT))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}.") from error
    return _Reader(path, buffer, size).header()


class _Reader:
    """A position in the header's bytes that never moves past their end."""

    def __init__(self, path: Path, buffer: bytes, size: int) -> None:
        self.path, self.buffer, self.size = path, buffer, size
        self.position = 0
        self.strings = 0

    def fail(self, reason: str) -> ModelError:
        return ModelError(f"{self.path}: not a usable GGUF file: {reason}.")

    def take(self, count: int, what: str) -> int:
        """Move on by `count` bytes and return where they begin."""
        start = self.position
        if count > len(self.buffer) - start:
            if start + count > self.size:
                raise self.fail(
                    f"{what} at byte {start} needs {count} bytes, past the end of the file ({self.size} bytes);"
                    " it is truncated or damaged, fetch it again"
                )
            raise self.fail(f"its header is larger than {HEADER_LIMIT >> 20} MB, at {what}")
        self.position = start + count
        return start

    def scalar(self, form: str, what: str) -> int | float:
        return struct.unpack_from(form, self.buffer, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        length = int(self.scalar("<Q", what))
        start = self.take(length, what)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} at byte {start} is not UTF-8") from None

    def header(self) -> Header:
        magic = self.buffer[self.take(4, "the magic number") :][:4]
        if magic != b"GGUF":
            raise self.fail(f"it begins with {magic!r}, not with b'GGUF'")
        version = self.scalar("<I", "the version")
        if version not in (2, 3):
            swapped = "; it is big endian" if version in (2 << 24, 3 << 24) else ""
            raise self.fail(f"version {version} is not supported (2 and 3, little endian, are){swapped}")
        tensor_count = int(self.scalar("<Q", "the number of tensors"))
        pair_count = int(self.scalar("<Q", "the number of metadata keys"))
        for count, what in ((tensor_count, "tensors"), (pair_count, "metadata keys")):
            if count > COUNT_LIMIT:
                raise self.fail(f"it claims {count} {what} (at most {COUNT_LIMIT} are accepted)")
        metadata: dict[str, Value] = {}
        for _ in range(pair_count):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.fail(f"the metadata key {key[:80]!r} appears twice")
            metadata[key] = self.value(key)
        described = [self.tensor() for _ in range(tensor_count)]
        return Header(metadata, self.placed(described, metadata))

    def value(self, key: str) -> Value:
        what = f"the value of {key[:80]!r}"
        kind = int(self.scalar("<I", what))
        if kind == _STRING:
            return self.string(what)
        if kind == _BOOL:
            return self.boolean(what)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _ARRAY:
            return self.array(what)
        raise self.fail(f"{what} has the unknown type {kind}")

    def boolean(self, what: str) -> bool:
        byte = self.scalar("<B", what)
        if byte > 1:
            raise self.fail(f"{what} is a truth value of {byte}")
        return bool(byte)

    def array(self, what: str) -> list[str] | np.ndarray:
        kind = int(self.scalar("<I", what))
        count = int(self.scalar("<Q", what))
        if kind == _STRING:
            self.strings += count
            if self.strings > STRING_LIMIT:
                raise self.fail(f"{what} brings its arrays to {self.strings} strings (at most {STRING_LIMIT})")
            return [self.string(what) for _ in range(count)]
        if kind == _ARRAY:
            raise self.fail(f"{what} is an array of arrays, which is not supported")
        form = np.dtype("<u1" if kind == _BOOL else _SCALARS[kind]) if kind in (_BOOL, *_SCALARS) else None
        if form is None:
            raise self.fail(f"{what} is an array of the unknown type {kind}")
        start = self.take(count * form.itemsize, what)
        return np.frombuffer(self.buffer, dtype=form, count=count, offset=start)

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, offset in the data and bytes of the next tensor."""
        name = self.string("a tensor's name")
        what = f"the description of tensor {name[:80]!r}"
        dimensions = int(self.scalar("<I", what))
        if not 1 <= dimensions <= DIMENSION_LIMIT:
            raise self.fail(f"tensor {name[:80]!r} has {dimensions} dimensions (1 to {DIMENSION_LIMIT})")
        shape = tuple(int(self.scalar("<Q", what)) for _ in range(dimensions))[::-1]
        number = int(self.scalar("<I", what))
        offset = int(self.scalar("<Q", what))
        kind = _TYPE_NAMES.get(number, f"number {number}")
        if kind not in BLOCKS:
            raise ModelError(
                f"{self.path}: tensor {name[:80]!r} is of ggml type {kind}, which is not supported"
                f" (supported: {', '.join(BLOCKS)}). Use a file of one of these, such as Q8_0 or Q4_0."
            )
        values, width = BLOCKS[kind]
        if not all(shape) or shape[-1] % values:
            raise self.fail(f"tensor {name[:80]!r} of type {kind} cannot have the shape {shape}")
        return name, kind, shape, offset, math.prod(shape) // values * width

    def placed(self, described: list[tuple], metadata: dict[str, Value]) -> dict[str, TensorInfo]:
        """Each tensor at its place in the file; aligned, inside the file, and none upon another."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {shorten(repr(alignment))}, not a power of two of 8 or more")
        data = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset, nbytes in described:
            if name in tensors:
                raise self.fail(f"tensor {name[:80]!r} appears twice")
            if offset % alignment or data + offset + nbytes > self.size:
                raise self.fail(
                    f"tensor {name[:80]!r} lies at byte {data + offset} and needs {nbytes} bytes: past the end of"
                    f" the file ({self.size} bytes) or not aligned; it is truncated or damaged, fetch it again"
                )
            tensors[name] = TensorInfo(name, kind, shape, data + offset, nbytes)
        end, before = data, ""
        for info in sorted(tensors.values(), key=lambda tensor: tensor.start):
            if info.start < end:
                raise self.fail(f"tensors {before[:80]!r} and {info.name[:80]!r} overlap")
            end, before = info.start + info.nbytes, info.name
        return tensors
