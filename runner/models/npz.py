"""Read an .npz of plain numeric arrays, as mlx-examples saves adapters, safely.

No pickle is loaded, and shapes can be inspected before any array is unpacked.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

_MAX_DIRECTORY_BYTES = 4 << 20
_MAX_HEADER_BYTES = 10_000
_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class NpzArchive:
    """An open .npz file. All methods raise ValueError, zipfile.BadZipFile or zlib.error for a malformed one."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(self._members) != len(archive.infolist()):
            raise ValueError("it contains a name twice")

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return list(self._members)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array, read from its header alone."""
        return {name: self._read_shape(info) for name, info in self._members.items()}

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each name and array. An array takes the memory that its shape claims: check `shapes` first."""
        for name, info in self._members.items():
            self._read_shape(info)  # refuses anything but numbers
            with self._archive.open(info) as member:
                array = npy.read_array(member, allow_pickle=False, max_header_size=_MAX_HEADER_BYTES)
            yield name, array.astype(array.dtype.newbyteorder("="), copy=False)

    def _read_shape(self, info: zipfile.ZipInfo) -> tuple[int, ...]:
        with self._archive.open(info) as member:
            version = npy.read_magic(member)
            if version not in _HEADER_READERS:
                raise ValueError(f"{info.filename} has the unsupported .npy version {version}")
            shape, _, dtype = _HEADER_READERS[version](member, max_header_size=_MAX_HEADER_BYTES)
        if dtype.kind not in "fiu":
            raise ValueError(f"{info.filename} contains {dtype}, not numbers")
        return shape


@contextmanager
def open_npz(path: Path) -> Iterator[NpzArchive]:
    """Open the archive at `path`. Raises ValueError or zipfile.BadZipFile if it is not an acceptable .npz."""
    with path.open("rb") as file:
        # Private, because ZipFile itself creates an object for every entry before their number can be checked.
        end_record = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end_record is None:
            raise ValueError("it is not a zip file")
        if end_record[zipfile._ECD_SIZE] > _MAX_DIRECTORY_BYTES:  # type: ignore[attr-defined]
            raise ValueError("it has too many entries for an adapter")
        with zipfile.ZipFile(file) as archive:
            yield NpzArchive(archive)
