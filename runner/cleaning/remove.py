"""Carrying out what `policy` decided: under the run's lock, decided again there, and renamed away before it is deleted.

A kill leaves the old state, or the new one with leftovers that begin with a dot, which the next clean removes.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.checkpoints import verify
from runner.checkpoints.store import CheckpointStore, step_name
from runner.cleaning.facts import Context, leftovers, reread_facts, stale_drafts
from runner.cleaning.policy import Policies, Removal, decide
from runner.common import layout
from runner.common.atomic_io import repair_replaced_folder
from runner.common.clock import utc_now
from runner.common.errors import DirectoryInUse, RunnerError
from runner.common.filesystem import FileSystem
from runner.reports.checkpoint_list import checkpoints_folder
from runner.runs.directory import RunDirectory
from runner.runs.find import is_sweep_folder
from runner.runs.inspect import RunInfo, folder_size, read_run

_DATE = re.compile(r"\d{4}-\d\d-\d\d")


class NotRemoved(Exception):
    """Raised where nothing of a run was removed; says why."""


def carry_out(planned: Removal, policies: Policies, context: Context, filesystem: FileSystem | None = None) -> int:
    """Remove what was planned of a run and still may go, and return the bytes that this frees.

    Raises:
        NotRemoved: it is in use now, has changed, or what would stay of it is damaged.
        StorageError: the disk fails.
    """
    filesystem = filesystem or FileSystem()
    with _locked(planned.run):
        removal, _ = decide(reread_facts(planned.run, context), policies)
        if removal is None or removal.whole != planned.whole:
            raise NotRemoved("has changed meanwhile")
        if removal.whole:
            _remove_run(planned.run, filesystem)
            return removal.size_bytes
        steps = [step for step in removal.steps if step in planned.steps]
        _remove_checkpoints(read_run(planned.run), removal, steps, filesystem)
        share = len(steps) / len(removal.steps)
        return round(removal.size_bytes * share)


def remove_leftovers(run: RunInfo, filesystem: FileSystem | None = None) -> int:
    """Finish or undo what killed processes left in the run's directory, and return the bytes that this frees.

    Raises:
        NotRemoved: the run is in use.
        StorageError: the disk fails.
    """
    filesystem = filesystem or FileSystem()
    with _locked(run.path):
        before = sum(folder_size(path) for path in leftovers(run))
        CheckpointStore(checkpoints_folder(run), str(run.status.get("run_id")), filesystem).repair()
        repair_replaced_folder(run.path / layout.RESULT, filesystem)
        draft = run.path / f".{layout.RESULT}.new"
        if draft.is_dir() and not draft.is_symlink():
            filesystem.remove_tree(draft)
        for draft in stale_drafts(run.path):
            filesystem.remove_tree(draft)
        return before - sum(folder_size(path) for path in leftovers(run))


def remove_interrupted(planned: Collection[Path], filesystem: FileSystem | None = None) -> int:
    """Remove the `planned` directories, whose removal was interrupted, and return the bytes that this frees."""
    filesystem, freed = filesystem or FileSystem(), 0
    for path in planned:
        freed += folder_size(path)
        filesystem.remove_tree(path)
        _remove_empty_date(path.parent)
    return freed


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run's lock, and before it that of the sweep that the run is a job of: a sweep that is resumed decides
    which of its jobs are done before it locks them. Raises NotRemoved."""
    sweep = run.resolve().parent
    directories = [RunDirectory(sweep)] if is_sweep_folder(sweep) else []
    directories.append(RunDirectory(run))
    try:
        for directory in directories:
            try:
                directory.lock()
            except DirectoryInUse:
                raise NotRemoved("in use") from None
        yield
    finally:
        for directory in reversed(directories):
            directory.unlock()


def _remove_run(path: Path, filesystem: FileSystem) -> None:
    aside = path.with_name(f".removed-{path.name}-{secrets.token_hex(4)}")
    filesystem.rename(path, aside)
    filesystem.fsync_folder(path.parent)
    filesystem.remove_tree(aside)
    _remove_empty_date(path.parent)


def _remove_checkpoints(run: RunInfo, removal: Removal, steps: list[int], filesystem: FileSystem) -> None:
    """Remove the checkpoints of `steps` once those that stay have been verified."""
    folder = checkpoints_folder(run)
    for step in removal.keeps:
        if not verify.is_whole(folder / step_name(step), filesystem):
            raise NotRemoved(f"step {step}, which would stay, is damaged: python -m runner verify says more")
    if steps and max(steps) > max(removal.keeps, default=-1):
        # Recorded first, so that a kill leaves no run whose newest checkpoint is gone for no known reason. It counts
        # only where that is gone.
        RunDirectory(run.path).write_status({**run.status, "cleaned": utc_now()})
    CheckpointStore(folder, str(run.status.get("run_id")), filesystem).remove(steps)


def _remove_empty_date(folder: Path) -> None:
    """Remove a folder named by a date that held runs and is empty now."""
    if _DATE.fullmatch(folder.name):
        with suppress(OSError, RunnerError):
            folder.rmdir()
