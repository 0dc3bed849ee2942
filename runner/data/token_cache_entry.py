"""One entry of the token cache: a folder with the arrays of a TokenSet as they are in memory, and a manifest.

Nothing in an entry changes once it is complete, so a mapping stays valid even where the entry has been removed.
"""

from __future__ import annotations

import hashlib
import os
import random
import zlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runner.common import sealed_json
from runner.common.disk_cache import DiskCache, cache_write_errors
from runner.common.filesystem import open_regular
from runner.data.encode import EncodedChunk
from runner.data.token_set import SplitStats, TokenSet, fingerprint_header

LAYOUT = 3
"""Version of the files of an entry."""
COLUMNS = {"offsets": "<i8", "tokens": "<i4", "supervised": "|b1", "unwanted": "|b1", "lines": "<i8"}
"""The arrays and their stored dtypes. The fingerprint is a hash of the first three in this order, and of the fourth if
any row is unwanted."""
MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20
"""Bytes that share a checksum."""
FULLY_CHECKED_BYTES = 256 << 20
"""Largest column of which every block is checked at each start: 0.1 s from memory, up to 1 s from a disk. Of larger
ones, `SAMPLED_BLOCKS` are checked, at random: damage to a whole file (truncation, blocks never written) is noticed at
once, a single wrong block after some starts. Sizes are always checked, and so are all offsets and lines: 16 bytes a
row, and a wrong one would show a row's tokens as another's."""
SAMPLED_BLOCKS = 64
MAX_BLOCKS = 1_000_000
_MAX_MANIFEST_BYTES = 64 << 20


def read_entry(folder: Path, key: str) -> tuple[TokenSet, SplitStats]:
    """Return the tokens of an entry, mapped rather than read.

    Raises:
        ValueError, KeyError, TypeError: the entry is damaged or not that of `key`.
        OSError: a file is missing, unreadable or not a regular file.
    """
    with _open(folder / MANIFEST) as file:
        manifest = sealed_json.unseal(file.read(_MAX_MANIFEST_BYTES), max_values=len(COLUMNS) * MAX_BLOCKS)
    if manifest.get("layout") != LAYOUT or manifest.get("key") != key:
        raise ValueError("it is the entry of another key")
    stats = SplitStats(**manifest["stats"])
    with ExitStack() as stack:
        files = {name: stack.enter_context(_open(folder / name)) for name in COLUMNS}
        for name, file in files.items():
            _check_column(file, name, **manifest["files"][name])
        tokens = _map_columns(files, stats)
    # What the cached property would compute from all bytes.
    vars(tokens)["fingerprint"] = manifest["fingerprint"]
    return tokens, stats


class EntryWriter:
    """A ChunkWriter to disk. A context manager: what is not committed is removed at its end.

    Every method raises CacheWriteError where the disk fails.
    """

    def __init__(self, cache: DiskCache) -> None:
        self.stats = SplitStats()
        self._cache_folder = cache.folder
        self._stack = ExitStack()
        self._draft = self._stack.enter_context(cache.draft())
        try:
            with cache_write_errors(cache.folder):
                self._files = {name: self._stack.enter_context(_create(self._draft.folder / name)) for name in COLUMNS}
                self._files["offsets"].write(np.zeros(1, COLUMNS["offsets"]).tobytes())
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # on a full disk, closing a file fails as writing it did
            self._stack.close()

    def append(self, chunk: EncodedChunk) -> None:
        """Append the rows of `chunk`."""
        ends = chunk.ends + self.stats.tokens
        with cache_write_errors(self._cache_folder):
            self._files["tokens"].write(chunk.tokens)
            self._files["supervised"].write(chunk.supervised)
            self._files["offsets"].write(ends.astype(COLUMNS["offsets"], copy=False).tobytes())
            self._files["unwanted"].write(chunk.unwanted.tobytes())
            self._files["lines"].write(chunk.lines.astype(COLUMNS["lines"], copy=False).tobytes())
        self.stats += chunk.stats

    def commit(self, key: str) -> TokenSet:
        """Publish the entry under `key` and return it mapped."""
        tokens = self.map()
        with cache_write_errors(self._cache_folder):
            manifest = self._make_manifest(key)
            (self._draft.folder / MANIFEST).write_bytes(sealed_json.seal(manifest))
        self._draft.commit(key)
        vars(tokens)["fingerprint"] = manifest["fingerprint"]
        return tokens

    def map(self) -> TokenSet:
        """Return what was appended, mapped, without publishing it."""
        with cache_write_errors(self._cache_folder):
            for file in self._files.values():
                file.flush()
            return _map_columns(self._files, self.stats)

    def _make_manifest(self, key: str) -> dict[str, Any]:
        """Return the manifest of the flushed files, computing checksums and fingerprint in one pass."""
        digest = hashlib.sha256(fingerprint_header(self.stats.tokens, self.stats.rows))
        files: dict[str, Any] = {}
        for name, file in self._files.items():
            file.seek(0)
            checksums, size = [], 0
            while block := file.read(BLOCK_BYTES):
                checksums.append(zlib.crc32(block))
                size += len(block)
                if name in ("offsets", "tokens", "supervised") or (name == "unwanted" and self.stats.unwanted):
                    digest.update(block)
            files[name] = {"size": size, "crc32": checksums}
        return {
            "layout": LAYOUT,
            "key": key,
            "stats": asdict(self.stats),
            "fingerprint": digest.hexdigest(),
            "files": files,
        }


def _check_column(file: BinaryIO, name: str, size: int, crc32: list[int]) -> None:
    found = os.fstat(file.fileno()).st_size
    if found != size:
        raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")
    blocks = list(range(len(crc32)))
    if name in ("tokens", "supervised") and size > FULLY_CHECKED_BYTES and len(blocks) > SAMPLED_BLOCKS:
        blocks = sorted({0, blocks[-1], *random.SystemRandom().sample(blocks, SAMPLED_BLOCKS)})
    for number in blocks:
        file.seek(number * BLOCK_BYTES)
        if zlib.crc32(file.read(BLOCK_BYTES)) != crc32[number]:
            raise ValueError(f"{name} does not match its checksum")


def _open(path: Path) -> BinaryIO:
    return open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _create(path: Path) -> BinaryIO:
    return open(path, "x+b")


def _map_columns(files: Mapping[str, BinaryIO], stats: SplitStats) -> TokenSet:
    shapes = {name: stats.rows for name in COLUMNS}
    shapes |= {"offsets": stats.rows + 1, "tokens": stats.tokens, "supervised": stats.tokens}
    # A plain array that views the mapping: indexing a np.memmap creates another np.memmap each time, which is slow.
    columns = {name: np.memmap(files[name], dtype, mode="r", shape=shapes[name]) for name, dtype in COLUMNS.items()}
    arrays: dict[str, Any] = {name: np.asarray(column) for name, column in columns.items()}
    return TokenSet(**arrays)
