"""A run's directory as bytes, to move it between machines that share no folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from runner.checkpoints import manifest, verify
from runner.checkpoints.store import CheckpointStore, step_name
from runner.common import layout
from runner.common.atomic_io import is_draft, write_atomically
from runner.common.errors import CheckpointError, StorageError
from runner.common.filesystem import FileSystem
from runner.common.layout import STEP_NAME
from runner.runs.directory import RunDirectory


@dataclass(frozen=True)
class PackedRun:
    """What a run's directory holds, as far as the receiver does not have it."""

    files: dict[str, bytes]
    """Path below the directory, with /, to content."""
    checkpoints: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Name of a checkpoint that the receiver lacks to its files, its manifest included."""
    all_checkpoints: tuple[str, ...] = ()
    """Names of all checkpoints: the receiver removes others."""
    checkpoint_dir: str = layout.CHECKPOINTS
    """Name of the folder of its checkpoints."""


def checkpoint_hashes(directory: RunDirectory) -> dict[str, str]:
    """Return the checkpoints of a run: name to SHA-256 of its manifest, which has those of its files."""
    hashes = {}
    for record in _store(directory).checkpoints():
        with suppress(OSError):
            hashes[record.path.name] = hashlib.sha256((record.path / manifest.NAME).read_bytes()).hexdigest()
    return hashes


def pack(directory: RunDirectory, known: Mapping[str, str], *, in_progress: bool = False) -> PackedRun:
    """Return the run in `directory` without the checkpoints that are `known`, as `checkpoint_hashes` gives them.

    Args:
        in_progress: whether the run is training: its result, which may be replaced at this moment, is left out.
    """
    hashes = checkpoint_hashes(directory)
    checkpoints = {}
    for name, digest in hashes.items():
        if known.get(name) == digest:
            continue
        with suppress(CheckpointError):  # removed meanwhile, or damaged, which is the run's to report
            loaded = verify.load_checkpoint(directory.checkpoints / name, FileSystem())
            checkpoints[name] = {**loaded.files, manifest.NAME: manifest.write(loaded.checkpoint.manifest)}
    # After the checkpoints, which count on the rows that were written before them.
    files = _files(directory, in_progress)
    return PackedRun(files, checkpoints, tuple(sorted(hashes)), directory.checkpoints.name)


def unpack(packed: PackedRun, directory: RunDirectory) -> None:
    """Make `directory`, which the caller has locked, hold the packed run. A kill at any time leaves a run that can be
    resumed.

    Raises:
        StorageError: the disk fails, or a name leads out of the directory.
        CheckpointError: a checkpoint arrived damaged.
    """
    filesystem, last = FileSystem(), (layout.CONFIG, layout.STATUS)
    for name in sorted(packed.files, key=lambda name: name in last):
        if name in last:
            break
        _write(directory.path, name, packed.files[name])
    store = _store(directory)
    for name, files in sorted(packed.checkpoints.items()):
        record = _manifest_of(name, files)
        store.copy(verify.LoadedCheckpoint(verify.CheckpointRecord(directory.checkpoints / name, record), files))
        if not verify.is_whole(directory.checkpoints / name, filesystem):
            raise CheckpointError(f"{directory.checkpoints / name}: it arrived damaged.")
    present = {record.step for record in store.checkpoints()}
    gone = {step for step in present if step_name(step) not in packed.all_checkpoints}
    store.remove(gone)
    for name in last:
        if name in packed.files:
            _write(directory.path, name, packed.files[name])


def _manifest_of(name: str, files: dict[str, bytes]) -> manifest.CheckpointManifest:
    """Take the manifest of a checkpoint from its files and return it."""
    try:
        if not STEP_NAME.fullmatch(name):
            raise ValueError("that is no name of a checkpoint")
        return manifest.read(files.pop(manifest.NAME))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{name}: it arrived damaged: {error}.") from None


def _store(directory: RunDirectory) -> CheckpointStore:
    return CheckpointStore(directory.checkpoints, run_id="")  # copies keep the identity that they have


def _files(directory: RunDirectory, in_progress: bool) -> dict[str, bytes]:
    """Return the regular files besides checkpoints, locks and drafts."""
    left_out = {directory.checkpoints.name, *([layout.RESULT] if in_progress else [])}
    found = {}
    for path in sorted(directory.path.rglob("*")):
        name = path.relative_to(directory.path)
        if name.parts[0] in left_out or name.parts[0] == layout.LOCK or any(is_draft(part) for part in name.parts):
            continue
        with suppress(OSError):  # a file that is gone meanwhile
            if path.is_file() and not path.is_symlink():
                found[name.as_posix()] = path.read_bytes()
    return found


def _write(folder: Path, name: str, data: bytes) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise StorageError(f"{folder}: {name} leads out of the directory of the run.")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file() or target.read_bytes() != data:
        write_atomically(target, data)
