"""Verified reading of a checkpoint: no byte is returned that its manifest does not vouch for.

Sizes are compared before anything is read, and the hash is taken of the very bytes that are returned. Links
and special files are refused wherever they are, so nothing outside the checkpoint's folder is read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoints import manifest as manifests
from runner.checkpoints import safetensors_file
from runner.checkpoints.manifest import CheckpointManifest, FileRecord
from runner.common.errors import CheckpointError
from runner.common.filesystem import FileSystem
from runner.common.layout import STEP_NAME

_MAX_UNCHECKED_BYTES = 1 << 26
KIND_TEXT = {"link": "a symbolic link", "file": "a file", "other": "a FIFO, a socket or a device"}
"""Each `Entry.kind` other than a folder, in words."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A checkpoint on disk: its folder and its manifest."""

    path: Path
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        """The update after which it was saved."""
        return self.manifest.step


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A verified checkpoint with the bytes of its listed files."""

    checkpoint: CheckpointRecord
    files: dict[str, bytes]


def load_checkpoint(path: Path, filesystem: FileSystem) -> LoadedCheckpoint:
    """Return the checkpoint in the folder `path`, verified. Files that its manifest does not list are ignored.

    Raises:
        CheckpointError: it is missing or damaged; names path and reason.
        StorageError: the machine, not the checkpoint, is at fault.
    """
    manifest = _read_complete_manifest(path, filesystem)
    files = {}
    for name, record in manifest.files.items():
        # A size that a hostile manifest claims is refused before the bytes fill the memory.
        if record.size > _MAX_UNCHECKED_BYTES and name.endswith(".safetensors"):
            safetensors_file.read_header(path / name)
        elif record.size > _MAX_UNCHECKED_BYTES:
            raise CheckpointError(
                f"{path / name}: {record.size:,} bytes, more than the limit of {_MAX_UNCHECKED_BYTES:,}"
            )
        data = filesystem.read_file(path / name, record.size)
        _compare(path / name, record, len(data), hashlib.sha256(data).hexdigest())
        files[name] = data
    return LoadedCheckpoint(CheckpointRecord(path, manifest), files)


def is_whole(path: Path, filesystem: FileSystem) -> bool:
    """Return whether `load_checkpoint` would accept `path`; reads in chunks. Raises StorageError."""
    try:
        manifest = _read_complete_manifest(path, filesystem)
        for name, record in manifest.files.items():
            _compare(path / name, record, *filesystem.sha256(path / name))
    except CheckpointError:
        return False
    return True


def read_manifest(path: Path, filesystem: FileSystem) -> CheckpointManifest:
    """Return the manifest of the checkpoint in `path` without verifying its files. Raises as `load_checkpoint`."""
    entry = filesystem.lstat(path)
    if entry is None:
        raise CheckpointError(f"{path}: there is no checkpoint")
    if entry.kind != "folder":
        raise CheckpointError(f"{path}: {KIND_TEXT[entry.kind]}, not a checkpoint's folder")
    file = path / manifests.NAME
    try:
        manifest = manifests.read(filesystem.read_file(file, manifests.MAX_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    step_name = STEP_NAME.fullmatch(path.name)
    if step_name and int(step_name[1]) != manifest.step:
        raise CheckpointError(f"{file}: it is of step {manifest.step}, but the folder is named {path.name}")
    return manifest


def _read_complete_manifest(path: Path, filesystem: FileSystem) -> CheckpointManifest:
    """Return the manifest after a check that each of its files is there, regular and of the stated size."""
    manifest = read_manifest(path, filesystem)
    for name in filesystem.listdir(path):
        entry = filesystem.lstat(path / name)
        if entry is not None and entry.kind in ("link", "other"):
            raise CheckpointError(f"{path / name}: {KIND_TEXT[entry.kind]}, not a regular file")
    for name, record in manifest.files.items():
        entry = filesystem.lstat(path / name)
        if entry is None:
            raise CheckpointError(f"{path / name}: missing")
        if entry.kind != "file":
            raise CheckpointError(f"{path / name}: not a regular file")
        _compare(path / name, record, entry.size, record.sha256)
    return manifest


def _compare(path: Path, record: FileRecord, size: int, sha256: str) -> None:
    if size != record.size:
        raise CheckpointError(f"{path}: {size:,} bytes, but the manifest says {record.size:,}")
    if sha256 != record.sha256:
        raise CheckpointError(f"{path}: its SHA-256 is not that of the manifest: it was changed or damaged")
