"""Reading a checkpoint: nothing is handed out that its manifest does not vouch for, byte by byte.

Sizes are compared before anything is read, and the hash is taken of the very bytes that are returned. Links
and special files are refused wherever they are, so nothing outside the checkpoint's folder is read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoints import manifest as manifests
from runner.checkpoints import safetensors_file
from runner.checkpoints.manifest import CheckpointManifest, FileRecord
from runner.common.errors import CheckpointError
from runner.common.filesystem import FileSystem

_LARGE = 1 << 26
STEP_NAME = re.compile(r"step-([0-9]{7,18})")
_KINDS = {"link": "a symbolic link", "file": "a file", "other": "a FIFO, a socket or a device"}


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """What a manifest says of its checkpoint; `metrics` may hold NaN, `created` (UTC) only informs."""

    step: int
    path: Path
    metrics: Mapping[str, float]
    why: tuple[str, ...]
    run_id: str
    created: str


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A verified checkpoint with the bytes of its listed files."""

    checkpoint: CheckpointRecord
    files: dict[str, bytes]


def load_checkpoint(path: Path, disk: FileSystem) -> LoadedCheckpoint:
    """The checkpoint in the folder `path`, verified. Files that its manifest does not list are ignored.

    Raises CheckpointError with the path and the reason, StorageError where the machine is at fault.
    """
    record = read_manifest(path, disk)
    _check_entries(path, record, disk)
    files = {}
    for name, expected in record.files.items():
        # What a hostile file claims is refused before its bytes fill the memory.
        if expected.size > _LARGE and name.endswith(".safetensors"):
            safetensors_file.read_header(path / name)
        elif expected.size > _LARGE:
            raise CheckpointError(f"{path / name}: {expected.size:,} bytes, more than the {_LARGE:,} it may have")
        data = disk.read_file(path / name, expected.size)
        _compare(path / name, expected, len(data), hashlib.sha256(data).hexdigest())
        files[name] = data
    return LoadedCheckpoint(record_from_manifest(path, record), files)


def is_whole(path: Path, disk: FileSystem) -> bool:
    """Whether `load` would accept `path`; reads in pieces, so it takes no memory. Raises StorageError."""
    try:
        record = read_manifest(path, disk)
        _check_entries(path, record, disk)
        for name, expected in record.files.items():
            _compare(path / name, expected, *disk.sha256(path / name))
    except CheckpointError:
        return False
    return True


def read_manifest(path: Path, disk: FileSystem) -> CheckpointManifest:
    """The manifest of the checkpoint in `path`; its files are not looked at. Raises as `load` does."""
    there = disk.lstat(path)
    if there is None:
        raise CheckpointError(f"{path}: there is no checkpoint")
    if there.kind != "folder":
        raise CheckpointError(f"{path}: {kind_text(there.kind)}, not a checkpoint's folder")
    file = path / manifests.NAME
    try:
        record = manifests.read(disk.read_file(file, manifests.MAX_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != record.step:
        raise CheckpointError(f"{file}: it is of step {record.step}, its folder is named after another")
    return record


def record_from_manifest(path: Path, record: CheckpointManifest) -> CheckpointRecord:
    """`record`, of the folder `path`, as the rest of the program sees it."""
    return CheckpointRecord(record.step, path, record.metrics, record.why, record.run_id, record.created)


def kind_text(kind: str) -> str:
    """An `Entry.kind` other than a folder, for a message."""
    return _KINDS[kind]


def _check_entries(path: Path, record: CheckpointManifest, disk: FileSystem) -> None:
    for name in disk.listdir(path):
        there = disk.lstat(path / name)
        if there is not None and there.kind in ("link", "other"):
            raise CheckpointError(f"{path / name}: {kind_text(there.kind)}, not a regular file")
    for name, expected in record.files.items():
        there = disk.lstat(path / name)
        if there is None:
            raise CheckpointError(f"{path / name}: missing")
        if there.kind != "file":
            raise CheckpointError(f"{path / name}: not a regular file")
        _compare(path / name, expected, there.size, expected.sha256)


def _compare(path: Path, expected: FileRecord, size: int, sha256: str) -> None:
    if size != expected.size:
        raise CheckpointError(f"{path}: {size:,} bytes, where the manifest says {expected.size:,}")
    if sha256 != expected.sha256:
        raise CheckpointError(f"{path}: its SHA-256 is not the manifest's: it was changed or damaged")
