"""A run's checkpoints on disk: committed whole, verified before use, repaired after a crash, rotated.

A checkpoint is written into ``.tmp-…``, synced, and renamed to ``step-0000100``: at every moment the folder
holds the old state or the new one. Replacing a step moves the old one to ``.old-…`` first, removing one
renames it to ``.del-…`` first; `Store.repair` finishes or undoes what a crash left. Order is by step, never
by a clock.

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
from runner.checkpoints.verify import STEP_NAME, CheckpointRecord, LoadedCheckpoint, kind_text
from runner.common.errors import CheckpointError, StorageError
from runner.common.filesystem import Content, FileSystem, sha256_of, size_of
from runner.common.text import format_bytes

_OLD = re.compile(r"\.old-(step-[0-9]{7,18})-[0-9a-f]{8}")
_BLOCK = 4096

Check = Callable[[LoadedCheckpoint], None]


def step_name(step: int) -> str:
    """``step-0000100``."""
    return f"step-{step:07d}"


def manifest_of(found: CheckpointRecord, files: Mapping[str, Content]) -> CheckpointManifest:
    """The manifest of `files`, some or all of those of the checkpoint `found`."""
    records = {name: FileRecord(size_of(content), sha256_of(content)) for name, content in files.items()}
    return CheckpointManifest(found.run_id, found.step, found.created, found.why, found.metrics, records)


class CheckpointStore:
    """The checkpoints of the run `run_id` in `folder`, which is created at the first commit."""

    def __init__(
        self, folder: Path, run_id: str, disk: FileSystem | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives seconds since 1970; it only dates manifests."""
        self.folder = Path(folder)
        self.run_id = run_id
        self._disk = disk or FileSystem()
        self._clock = clock

    def commit(
        self,
        step: int,
        files: Mapping[str, Content],
        *,
        why: Sequence[str] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> CheckpointRecord:
        """Save `files` as the checkpoint of `step`, replacing one that is there, and sync it.

        Raises StorageError where the disk fails or lacks room (what was saved before is then intact),
        ValueError for a name, a step or a metric that a manifest cannot hold.
        """
        record = CheckpointManifest(
            run_id=self.run_id,
            step=step,
            created=datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds"),
            why=tuple(why),
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            files={name: FileRecord(size_of(content), sha256_of(content)) for name, content in files.items()},
        )
        return self._commit(record, files)

    def copy(self, loaded: LoadedCheckpoint) -> CheckpointRecord:
        """Save a verified checkpoint of another folder here as it is, its manifest included; raises as `commit`."""
        return self._commit(manifest_of(loaded.checkpoint, loaded.files), loaded.files)

    def _commit(self, record: CheckpointManifest, files: Mapping[str, Content]) -> CheckpointRecord:
        contents = {**files, manifests.NAME: manifests.write(record)}  # the manifest is written last
        target = self.folder / step_name(record.step)
        try:
            self._make_folder()
            self.repair()
            self._require_room([size_of(content) for content in contents.values()])
            self._write(target, contents)
        except (StorageError, CheckpointError) as error:
            raise StorageError(
                f"step {record.step} was not saved; the checkpoints before it are untouched. {error}"
            ) from error
        return verify.record_from_manifest(target, record)

    def _write(self, target: Path, contents: Mapping[str, Content]) -> None:
        disk, temporary = self._disk, self._aside("tmp", target.name)
        try:
            disk.mkdir(temporary)
            for name, content in contents.items():
                disk.write_file(temporary / name, content)
            disk.fsync_folder(temporary)
            replaced = self._put(temporary, target)
        except StorageError:
            # Gives the room back at once. Only where the disk answers: after a kill, `repair` does it.
            with suppress(StorageError):
                disk.remove_tree(temporary)
            raise
        disk.fsync_folder(self.folder)
        if replaced:
            disk.remove_tree(replaced)

    def _put(self, temporary: Path, target: Path) -> Path | None:
        """Rename `temporary` to `target`; where one was there, move it aside and return where it is now."""
        kind = self._kind(target.name)
        if kind is None:
            self._disk.rename(temporary, target)
            return None
        if kind != "folder":
            raise StorageError(f"{target}: {kind_text(kind)} is in the way. Move it away.")
        old = self._aside("old", target.name)
        self._disk.rename(target, old)
        try:
            self._disk.rename(temporary, target)
        except StorageError:
            with suppress(StorageError):
                self._disk.rename(old, target)
            raise
        return old

    def repair(self) -> list[str]:
        """Finish or undo what a crash cut off, and remove leftovers; a sentence for each thing done.

        Raises StorageError where the disk fails, or where the folder is a link or not a folder.
        """
        if not self._has_folder():
            return []
        said = []
        names = self._disk.listdir(self.folder)
        for name in names:
            if (found := _OLD.fullmatch(name)) and self._kind(name) == "folder":
                said.append(self._settle(self.folder / name, self.folder / found[1]))
        for name in names:
            if name.startswith((".tmp-", ".del-")):
                self._disk.remove_tree(self.folder / name)
                cut_off = "a save" if name.startswith(".tmp-") else "a removal"
                said.append(f"{self.folder / name}: removed; {cut_off} was cut off.")
        return said

    def _settle(self, old: Path, target: Path) -> str:
        """End a replacement that was cut off: the new one stays if it is whole, else the old one returns."""
        disk = self._disk
        there = disk.lstat(target) is not None
        if there and (verify.is_whole(target, disk) or not verify.is_whole(old, disk)):
            disk.fsync_folder(self.folder)  # the new one's name must last before the old one goes
            disk.remove_tree(old)
            return f"{target}: kept; {old.name}, which it replaces, removed."
        damaged = self._aside("del", target.name)
        if there:
            disk.rename(target, damaged)
        disk.rename(old, target)
        disk.fsync_folder(self.folder)
        if there:
            disk.remove_tree(damaged)
        return f"{target}: put back from {old.name}; its replacement was cut off."

    def rotate(self, keep: set[int]) -> list[int]:
        """Remove this run's checkpoints whose step is not in `keep`; returns the removed steps.

        Whatever `keep` says, the newest one that verifies stays, and where none verifies all stay.
        Checkpoints of another run, links, and folders without a sound manifest are not touched.
        Raises StorageError.
        """
        if not self._has_folder():
            return []
        own = [found.step for found in self.checkpoints() if found.run_id == self.run_id]
        if not set(own) - keep:
            return []
        whole = (step for step in reversed(own) if verify.is_whole(self.folder / step_name(step), self._disk))
        newest = next(whole, None)
        going = [] if newest is None else [step for step in own if step not in keep | {newest}]
        self.remove(going)
        return going

    def remove(self, steps: Iterable[int]) -> None:
        """Remove the checkpoints of `steps`, whatever they are worth. Raises StorageError."""
        removed = []
        for step in sorted(steps):
            name = step_name(step)
            removed.append(self._aside("del", name))
            self._disk.rename(self.folder / name, removed[-1])
        if removed:
            # A power cut must not bring a name back whose files are already gone.
            self._disk.fsync_folder(self.folder)
        for path in removed:
            self._disk.remove_tree(path)

    def checkpoints(self) -> list[CheckpointRecord]:
        """Those whose manifest is sound, of any run, by step. Their files are not verified: see `load`."""
        found = []
        for step in self._steps():
            path = self.folder / step_name(step)
            with suppress(CheckpointError):
                found.append(verify.record_from_manifest(path, verify.read_manifest(path, self._disk)))
        return found

    def load(self, path: Path) -> LoadedCheckpoint:
        """The checkpoint at `path`, in this folder or anywhere, every byte of it verified.

        Files that the manifest does not list are ignored. Raises CheckpointError with the path and the
        reason, StorageError where the machine, not the checkpoint, is at fault.
        """
        return verify.load_checkpoint(Path(path), self._disk)

    def newest_valid(self, check: Check | None = None) -> tuple[LoadedCheckpoint | None, list[str]]:
        """The newest checkpoint of this run that is sound, and what is wrong with newer ones.

        `check` may refuse one by raising CheckpointError. ``(None, [])`` means that there never was one,
        ``(None, [...])`` that none can be used: then do not start over in silence. Raises StorageError.
        """
        wrong = self._unsettled()
        for step in reversed(self._steps()):
            path = self.folder / step_name(step)
            try:
                if (owner := verify.read_manifest(path, self._disk).run_id) != self.run_id:
                    wrong.append(f"{path}: left by another run ({owner}; this one is {self.run_id})")
                    continue
                loaded = self.load(path)
                if check:
                    check(loaded)
                return loaded, wrong
            except CheckpointError as error:
                wrong.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        return None, wrong

    def _steps(self) -> list[int]:
        names = self._disk.listdir(self.folder) if self._has_folder() else []
        steps = [int(found[1]) for name in names if (found := STEP_NAME.fullmatch(name))]
        return sorted(step for step in set(steps) if step_name(step) in set(names))

    def _unsettled(self) -> list[str]:
        """What only `repair` brings back: a replaced checkpoint that is aside, the new one not there."""
        names = self._disk.listdir(self.folder) if self._has_folder() else []
        aside = [(name, found[1]) for name in names if (found := _OLD.fullmatch(name))]
        lost = [name for name, step in aside if step not in names]
        return [f"{self.folder / name}: put aside by a replacement that was cut off" for name in lost]

    def _kind(self, name: str) -> str | None:
        there = self._disk.lstat(self.folder / name)
        return there.kind if there else None

    def _has_folder(self) -> bool:
        there = self._disk.lstat(self.folder)
        if there is not None and there.kind != "folder":
            raise StorageError(f"{self.folder}: {kind_text(there.kind)}, where checkpoints need a folder")
        return there is not None

    def _make_folder(self) -> None:
        if self._has_folder():
            return
        missing = [self.folder]
        while self._disk.lstat(missing[-1].parent) is None:
            missing.append(missing[-1].parent)
        for folder in reversed(missing):
            self._disk.mkdir(folder)
            self._disk.fsync_folder(folder.parent)

    def _require_room(self, sizes: Sequence[int]) -> None:
        needed = sum(-(-size // _BLOCK) * _BLOCK for size in sizes) + _BLOCK
        free = self._disk.free_space(self.folder)
        if needed > free:
            raise StorageError(
                f"{self.folder}: needs {format_bytes(needed)}, has {format_bytes(free)}. "
                "Make room there, then resume the run."
            )

    def _aside(self, what: str, name: str) -> Path:
        return self.folder / f".{what}-{name}-{secrets.token_hex(4)}"
