"""A run's checkpoints on disk: committed whole, verified before use, repaired after a crash, rotated.

A checkpoint is written into ``.tmp-…``, synced, and renamed to ``step-0000100``: at every moment the folder
holds the old state or the new one. Replacing a step moves the old one to ``.old-…`` first, removing one
renames it to ``.del-…`` first; `CheckpointStore.repair` finishes or undoes what a crash left. Order is by step,
never by a clock.

The caller holds the run's lock; the folder must not be a symbolic link (resolve a path that a user named).
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from runner.checkpoints import manifest as manifests
from runner.checkpoints import verify
from runner.checkpoints.manifest import CheckpointManifest, FileRecord
from runner.checkpoints.verify import KIND_TEXT, CheckpointRecord, LoadedCheckpoint
from runner.common.atomic_io import errors_named
from runner.common.errors import CheckpointError, StorageError
from runner.common.filesystem import Content, FileSystem, sha256_of, size_of
from runner.common.layout import STEP_NAME
from runner.common.storage_errors import insufficient_space

_REPLACED_NAME = re.compile(rf"\.old-({STEP_NAME.pattern})-[0-9a-f]{{8}}")
_DISK_BLOCK = 4096  # bytes: what a file occupies is rounded up to it

Check = Callable[[LoadedCheckpoint], None]


def step_name(step: int) -> str:
    """Return the name of the folder of a checkpoint: ``step-0000100``."""
    return f"step-{step:07d}"


class CheckpointStore:
    """The checkpoints of the run `run_id` in `folder`, which is created at the first commit."""

    def __init__(self, folder: Path, run_id: str, filesystem: FileSystem | None = None) -> None:
        self.folder = Path(folder)
        self.run_id = run_id
        self._filesystem = filesystem or FileSystem()

    def commit(
        self,
        step: int,
        files: Mapping[str, Content],
        *,
        save_reasons: Sequence[str] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> CheckpointRecord:
        """Save `files` as the checkpoint of `step`, replacing an existing one, and sync it.

        Raises:
            StorageError: the disk fails or is full; what was saved before is intact.
            ValueError: a name, a step or a metric that a manifest cannot hold.
        """
        manifest = CheckpointManifest(
            run_id=self.run_id,
            step=step,
            created=datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
            save_reasons=tuple(save_reasons),
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            files=file_records(files),
        )
        return self._commit(manifest, files)

    def copy(self, loaded: LoadedCheckpoint) -> CheckpointRecord:
        """Save a verified checkpoint of another folder unchanged, its manifest included. Raises as `commit`."""
        return self._commit(loaded.checkpoint.manifest, loaded.files)

    def _commit(self, manifest: CheckpointManifest, files: Mapping[str, Content]) -> CheckpointRecord:
        contents = {**files, manifests.NAME: manifests.write(manifest)}  # the manifest is written last
        target = self.folder / step_name(manifest.step)
        try:
            self._make_folder()
            self.repair()
            self._require_space([size_of(content) for content in contents.values()])
            self._write(target, contents)
        except (StorageError, CheckpointError) as error:
            raise StorageError(
                f"step {manifest.step} was not saved; the checkpoints before it are untouched. {error}"
            ) from error
        return CheckpointRecord(target, manifest)

    def _write(self, target: Path, contents: Mapping[str, Content]) -> None:
        filesystem, temporary = self._filesystem, self._aside("tmp", target.name)
        try:
            with errors_named(temporary, target):
                filesystem.mkdir(temporary)
                for name, content in contents.items():
                    filesystem.write_file(temporary / name, content)
                filesystem.fsync_folder(temporary)
                replaced = self._rename_to(target, temporary)
        except StorageError:
            # Frees the space at once. Only after an error: after a kill, `repair` does it.
            with suppress(StorageError):
                filesystem.remove_tree(temporary)
            raise
        filesystem.fsync_folder(self.folder)
        if replaced:
            filesystem.remove_tree(replaced)

    def _rename_to(self, target: Path, temporary: Path) -> Path | None:
        """Rename `temporary` to `target`; move an existing checkpoint aside first and return its new path."""
        kind = self._kind(target.name)
        if kind is None:
            self._filesystem.rename(temporary, target)
            return None
        if kind != "folder":
            raise StorageError(f"{target}: {KIND_TEXT[kind]} is in the way. Move it away.")
        old = self._aside("old", target.name)
        self._filesystem.rename(target, old)
        try:
            self._filesystem.rename(temporary, target)
        except StorageError:
            with suppress(StorageError):
                self._filesystem.rename(old, target)
            raise
        return old

    def repair(self) -> list[str]:
        """Finish or undo what a crash interrupted, and remove leftovers; return a message for each change.

        Raises:
            StorageError: the disk fails, or the folder is a link or not a folder.
        """
        messages = []
        names = self._names()
        for name in names:
            if (match := _REPLACED_NAME.fullmatch(name)) and self._kind(name) == "folder":
                messages.append(self._settle(self.folder / name, self.folder / match[1]))
        for name in names:
            if name.startswith((".tmp-", ".del-")):
                self._filesystem.remove_tree(self.folder / name)
                interrupted = "a save" if name.startswith(".tmp-") else "a removal"
                messages.append(f"{self.folder / name}: removed; {interrupted} was interrupted.")
        return messages

    def _settle(self, old: Path, target: Path) -> str:
        """End an interrupted replacement: the new checkpoint stays if it is whole, else the old one returns."""
        filesystem = self._filesystem
        exists = filesystem.lstat(target) is not None
        if exists and (verify.is_whole(target, filesystem) or not verify.is_whole(old, filesystem)):
            filesystem.fsync_folder(self.folder)  # the name of the new one must last before the old one is removed
            filesystem.remove_tree(old)
            return f"{target}: kept; {old.name}, which it replaces, removed."
        damaged = self._aside("del", target.name)
        if exists:
            filesystem.rename(target, damaged)
        filesystem.rename(old, target)
        filesystem.fsync_folder(self.folder)
        if exists:
            filesystem.remove_tree(damaged)
        return f"{target}: put back from {old.name}; its replacement was interrupted."

    def rotate(self, keep: set[int]) -> list[int]:
        """Remove the checkpoints of this run whose step is not in `keep`; return the removed steps.

        Whatever `keep` says, the newest one that verifies stays, and if none verifies all stay.
        Checkpoints of another run, links, and folders without a sound manifest are not touched.

        Raises:
            StorageError: the disk fails.
        """
        steps = [checkpoint.step for checkpoint in self.checkpoints() if checkpoint.manifest.run_id == self.run_id]
        if not set(steps) - keep:
            return []
        whole = (s for s in reversed(steps) if verify.is_whole(self.folder / step_name(s), self._filesystem))
        newest = next(whole, None)
        removed = [] if newest is None else [step for step in steps if step not in keep | {newest}]
        self.remove(removed)
        return removed

    def remove(self, steps: Iterable[int]) -> None:
        """Remove the checkpoints of `steps` unconditionally. Raises StorageError."""
        removed = []
        for step in sorted(steps):
            name = step_name(step)
            removed.append(self._aside("del", name))
            self._filesystem.rename(self.folder / name, removed[-1])
        if removed:
            # A power cut must not bring a name back whose files are already gone.
            self._filesystem.fsync_folder(self.folder)
        for path in removed:
            self._filesystem.remove_tree(path)

    def checkpoints(self) -> list[CheckpointRecord]:
        """Return those whose manifest is sound, of any run, by step. Their files are not verified: see `load`."""
        records = []
        for step in self._steps():
            path = self.folder / step_name(step)
            with suppress(CheckpointError):
                records.append(CheckpointRecord(path, verify.read_manifest(path, self._filesystem)))
        return records

    def load(self, path: Path) -> LoadedCheckpoint:
        """Return the checkpoint at `path`, in this folder or elsewhere: see `verify.load_checkpoint`."""
        return verify.load_checkpoint(Path(path), self._filesystem)

    def load_step(self, step: int) -> LoadedCheckpoint:
        """Return the checkpoint of `step` in this folder: see `verify.load_checkpoint`."""
        return self.load(self.folder / step_name(step))

    def newest_valid(self, check: Check | None = None) -> tuple[LoadedCheckpoint | None, list[str]]:
        """Return the newest valid checkpoint of this run, and what is wrong with newer ones.

        ``(None, [])`` means that there never was one, ``(None, [...])`` that none can be used: then the caller must
        not silently start from the beginning.

        Args:
            check: may refuse a checkpoint by raising CheckpointError.

        Raises:
            StorageError: the disk fails.
        """
        problems = self._unsettled()
        for step in reversed(self._steps()):
            path = self.folder / step_name(step)
            try:
                if (owner := verify.read_manifest(path, self._filesystem).run_id) != self.run_id:
                    problems.append(f"{path}: left by another run ({owner}; this one is {self.run_id})")
                    continue
                loaded = self.load(path)
                if check:
                    check(loaded)
                return loaded, problems
            except CheckpointError as error:
                problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        return None, problems

    def _steps(self) -> list[int]:
        names = set(self._names())
        steps = {int(match[1]) for name in names if (match := STEP_NAME.fullmatch(name))}
        return sorted(step for step in steps if step_name(step) in names)

    def _unsettled(self) -> list[str]:
        """Return a message for each replaced checkpoint that only `repair` can bring back."""
        names = self._names()
        replaced = [(name, match[1]) for name in names if (match := _REPLACED_NAME.fullmatch(name))]
        lost = [name for name, target in replaced if target not in names]
        return [f"{self.folder / name}: moved aside by a replacement that was interrupted" for name in lost]

    def _names(self) -> list[str]:
        return self._filesystem.listdir(self.folder) if self._has_folder() else []

    def _kind(self, name: str) -> str | None:
        entry = self._filesystem.lstat(self.folder / name)
        return entry.kind if entry else None

    def _has_folder(self) -> bool:
        entry = self._filesystem.lstat(self.folder)
        if entry is not None and entry.kind != "folder":
            raise StorageError(f"{self.folder}: {KIND_TEXT[entry.kind]}, but checkpoints need a folder")
        return entry is not None

    def _make_folder(self) -> None:
        if self._has_folder():
            return
        missing = [self.folder]
        while self._filesystem.lstat(missing[-1].parent) is None:
            missing.append(missing[-1].parent)
        for folder in reversed(missing):
            self._filesystem.mkdir(folder)
            self._filesystem.fsync_folder(folder.parent)

    def _require_space(self, sizes: Sequence[int]) -> None:
        needed = sum(-(-size // _DISK_BLOCK) * _DISK_BLOCK for size in sizes) + _DISK_BLOCK
        free = self._filesystem.free_space(self.folder)
        if needed > free:
            raise insufficient_space(self.folder, needed=needed, free=free)

    def _aside(self, kind: str, name: str) -> Path:
        return self.folder / f".{kind}-{name}-{secrets.token_hex(4)}"


def file_records(files: Mapping[str, Content]) -> dict[str, FileRecord]:
    """Return size and SHA-256 of each of `files`, as a manifest lists them."""
    return {name: FileRecord(size_of(content), sha256_of(content)) for name, content in files.items()}
