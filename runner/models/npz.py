"""An .npz of plain arrays, as mlx-examples saves adapters: no pickles, nothing unpacked before its size is known."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

_LARGEST_DIRECTORY = 4 << 20
_LONGEST_HEADER = 10_000
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class NpzArchive:
    """An open .npz. Its methods raise ValueError, or what zipfile and zlib raise, for one that is not sound."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(self._members) != len(archive.infolist()):
            raise ValueError("a name is in it twice")

    @property
    def names(self) -> list[str]:
        """The names of its arrays."""
        return list(self._members)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array, from its header alone."""
        return {name: self._shape(info) for name, info in self._members.items()}

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each array. It takes the memory that its shape says: look at `shapes` first."""
        for name, info in self._members.items():
            self._shape(info)  # of numbers, and nothing else
            with self._archive.open(info) as member:
                array = npy.read_array(member, allow_pickle=False, max_header_size=_LONGEST_HEADER)
            yield name, array.astype(array.dtype.newbyteorder("="), copy=False)

    def _shape(self, info: zipfile.ZipInfo) -> tuple[int, ...]:
        with self._archive.open(info) as member:
            version = npy.read_magic(member)
            if version not in _HEADERS:
                raise ValueError(f"{info.filename} is of the .npy version {version}")
            shape, _, dtype = _HEADERS[version](member, max_header_size=_LONGEST_HEADER)
        if dtype.kind not in "fiu":
            raise ValueError(f"{info.filename} holds {dtype}, not numbers")
        return shape


@contextmanager
def open_npz(path: Path) -> Iterator[NpzArchive]:
    """The archive at `path`. Raises ValueError or zipfile.BadZipFile where it is none."""
    with path.open("rb") as file:
        # zipfile would make an object of each entry before anyone can count them.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end is None:
            raise ValueError("it is not a zip file")
        if end[zipfile._ECD_SIZE] > _LARGEST_DIRECTORY:  # type: ignore[attr-defined]
            raise ValueError("it lists too many entries for an adapter")
        with zipfile.ZipFile(file) as archive:
            yield NpzArchive(archive)
