"""The facts on which `policy` decides, read from run directories; symbolic links are not followed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.checkpoints import manifest, mirror, verify
from runner.cleaning.policy import CheckpointFacts, RunFacts
from runner.common import layout
from runner.common.atomic_io import is_draft, is_draft_folder, is_stale
from runner.common.errors import CheckpointError, RunnerError
from runner.common.filesystem import FileSystem, is_apple_double
from runner.reports.checkpoint_list import LEFT_BY_ANOTHER_RUN, checkpoints_folder, list_checkpoints, result_step
from runner.runs.directory import RunDirectory, unexpected_names
from runner.runs.find import SweepInfo, is_sweep_folder, read_sweep
from runner.runs.inspect import RunInfo, read_run
from runner.runs.lineage import ParentIndex, parents

TEMPORARY = (".tmp-", ".del-", ".old-")
"""Prefixes of what a save or a removal leaves that was killed, in a folder of checkpoints."""
REMOVED = re.compile(r"\.removed-.{1,200}-[0-9a-f]{8}")
"""A run's directory whose removal was interrupted."""
_HYDRA_FILES = {"config.yaml", "hydra.yaml", "overrides.yaml"}
_ADAPTER_FILES = {layout.ADAPTERS, layout.ADAPTER_CONFIG, manifest.NAME}
_CHECKPOINT_FILES = {*_ADAPTER_FILES, "optimizer.safetensors", layout.UNAVERAGED, layout.TRAIN_STATE}
_RUN_FILES = {
    layout.CONFIG,
    layout.STATUS,
    layout.METRICS,
    layout.SAMPLES,
    layout.LOG,
    layout.LOCK,
    layout.LABELS,
    layout.ROW_LOSSES,
    layout.REPORT,
    "metrics.csv",
}
_OTHER_FILES = re.compile(r"events\.out\.tfevents\..*")
_LOGGER_FOLDERS = {"wandb"}


@dataclass
class Context:
    """What the facts of a run depend on beside its own directory; all paths are resolved."""

    index: ParentIndex
    """All runs among which parents are looked for."""
    sweeps: dict[Path, SweepInfo] = field(default_factory=dict)
    """Sweeps by the path of each of their jobs."""
    ranks: dict[Path, int] = field(default_factory=dict)
    """Place of each job that has a value among the jobs of its sweep, 0 for the best."""
    children: dict[Path, set[int]] = field(default_factory=dict)
    """Path of a run that others began from, to the steps of the checkpoints that they name."""

    @classmethod
    def of(cls, entries: Sequence[RunInfo | SweepInfo]) -> Context:
        """Return the context of the runs and sweeps that were found."""
        present = {entry.path.resolve() for entry in entries if isinstance(entry, SweepInfo)}
        above = {entry.path.resolve().parent for entry in entries if isinstance(entry, RunInfo)} - present
        # A job may have been found by itself: what it is among the others, only its sweep tells.
        members = [*entries, *(read_sweep(folder) for folder in sorted(above) if is_sweep_folder(folder))]
        context = cls(ParentIndex(members))
        for entry in members:
            if isinstance(entry, SweepInfo):
                ranked = entry.objective.rank(entry.runs)
                measured = [run for run in ranked if entry.objective.value(run) is not None]
                context.ranks |= {run.path.resolve(): rank for rank, run in enumerate(measured)}
                context.sweeps |= {run.path.resolve(): entry for run in entry.runs}
                for run in entry.runs:
                    context._add_parents(run)
            context._add_parents(entry)
        return context

    def _add_parents(self, member: RunInfo | SweepInfo) -> None:
        for recorded in parents(member):
            parent = replace(recorded, path=recorded.path.resolve())
            found = self.index.find(parent)
            if found is None or found.path.resolve() == member.path.resolve():
                continue
            steps = self.children.setdefault(found.path.resolve(), set())
            if parent.step is not None:
                steps.add(parent.step)
            if isinstance(found, SweepInfo) and found.best:  # a sweep stands for its best job
                self.children.setdefault(found.best.path.resolve(), set())


def read_facts(run: RunInfo, context: Context, *, verify_result: bool = True, is_held: bool = False) -> RunFacts:
    """Return the facts of the run.

    Args:
        run: the run.
        context: see `Context`.
        verify_result: whether to read adapters/, without which a run counts as one without a result.
        is_held: whether this process itself holds the locks of the run and of its sweep.
    """
    path = run.path.resolve()
    sweep = context.sweeps.get(path)
    in_use = not is_held and (
        RunDirectory(run.path).is_locked() or (sweep is not None and RunDirectory(sweep.path).is_locked())
    )
    listed = list_checkpoints(run)
    unknown = unknown_names(run)
    foreign = {checkpoint.step: _foreign_content(checkpoint.path) for checkpoint in listed}
    return RunFacts(
        path=run.path,
        state=run.state,
        in_use=in_use,
        age_days=(time.time() - run.updated) / 86_400,
        size_bytes=run.size_bytes,
        checkpoints=tuple(
            CheckpointFacts(
                step=checkpoint.step,
                size_bytes=checkpoint.size_bytes,
                valid_loss=checkpoint.valid_loss,
                problem=checkpoint.problem or foreign[checkpoint.step],
                is_foreign=checkpoint.problem == LEFT_BY_ANOTHER_RUN or foreign[checkpoint.step] is not None,
            )
            for checkpoint in listed
        ),
        result_step=result_step(run, listed),
        has_result=verify_result and verify.is_whole(run.path / layout.RESULT, FileSystem()),
        has_adapters=has_adapters(run.path),
        has_trained=bool(run.step) or any(row["step"] > 0 for row in run.rows),
        is_job=sweep is not None,
        rank=context.ranks.get(path),
        parent_steps=frozenset(context.children.get(path, ())),
        is_parent=path in context.children,
        unknown=tuple(name for name in unknown if not _is_made(name)),
        made=tuple(name for name in unknown if _is_made(name)),
    )


def reread_facts(path: Path, context: Context) -> RunFacts:
    """Return the facts of the run; this process has taken its lock and that of its sweep meanwhile."""
    return read_facts(read_run(path), context, is_held=True)


def is_cleanable(run: RunInfo) -> bool:
    """Return whether the directory is a run's own, and not the backup of one."""
    return not mirror.is_backup(run.path) and not run.path.is_symlink()


def has_adapters(run: Path) -> bool:
    """Return whether the run's directory holds a result, whole or not; a kill may have left it under another name."""
    return any(_entries(run / name) for name in (layout.RESULT, f".{layout.RESULT}.old"))


def _is_made(name: str) -> bool:
    return name == f"{layout.EVALUATIONS}/" or name.startswith(layout.EXPORT_PREFIX)


def unknown_names(run: RunInfo) -> list[str]:
    """Return what lies in the run's directory that a run does not write, relative to it."""
    folder = checkpoints_folder(run).name
    found = [] if os.path.lexists(run.path / layout.LOCK) else [f"{layout.CONFIG} without {layout.LOCK}"]
    for entry in _entries(run.path):
        name = entry.name
        if entry.is_symlink():
            found.append(name)
        elif entry.is_dir():
            inner = {layout.HYDRA: _HYDRA_FILES, layout.RESULT: _ADAPTER_FILES}.get(name)
            if inner is not None:
                found += [f"{name}/{other}" for other in _others(Path(entry.path), inner)]
            elif name == folder:
                found += [f"{name}/{other}" for other in _unknown_checkpoints(Path(entry.path))]
            elif name in _LOGGER_FOLDERS:
                found += [f"{name}/{other} (not synced)" for other in _not_synced(Path(entry.path))]
            elif name not in (".adapters.new", ".adapters.old") and not _is_stale_draft(entry):
                found.append(f"{name}/")
        elif name not in _RUN_FILES and not _OTHER_FILES.fullmatch(name) and unexpected_names(run.path, ()).count(name):
            found.append(name)
    return sorted(found)


def leftovers(run: RunInfo) -> list[Path]:
    """Return what killed processes left in the run's directory."""
    folder = checkpoints_folder(run)
    found = [] if folder.is_symlink() else [e for e in _entries(folder) if e.name.startswith(TEMPORARY) and e.is_dir()]
    paths = [Path(entry.path) for entry in found if not entry.is_symlink()]
    aside = run.path / f".{layout.RESULT}.new"
    paths += [aside] if aside.is_dir() and not aside.is_symlink() else []
    return [*paths, *stale_drafts(run.path)]


def stale_drafts(run: Path) -> list[Path]:
    """Return the exports in the run's directory whose process was killed while it wrote them."""
    return [Path(entry.path) for entry in _entries(run) if entry.is_dir() and _is_stale_draft(entry)]


def _is_stale_draft(entry: os.DirEntry[str]) -> bool:
    return is_draft_folder(entry.name) and not entry.is_symlink() and is_stale(Path(entry.path))


def interrupted_removals(root: Path) -> list[Path]:
    """Return the directories below `root` whose removal was interrupted."""
    found, pending = [], [root]
    while pending:
        for entry in _entries(pending.pop()):
            if entry.is_symlink() or not entry.is_dir():
                continue
            if REMOVED.fullmatch(entry.name) and _is_rest_of_run(Path(entry.path)):
                found.append(Path(entry.path))
            elif not entry.name.startswith("."):
                pending.append(Path(entry.path))
    return sorted(found)


def _is_rest_of_run(folder: Path) -> bool:
    """Return whether all that is left in the folder is what a run writes, by its names."""
    folders = {layout.HYDRA, layout.RESULT, f".{layout.RESULT}.new", f".{layout.RESULT}.old", *_LOGGER_FOLDERS}
    for entry in _entries(folder):
        if entry.is_dir() and not entry.is_symlink():
            inner = [other.name for other in _entries(Path(entry.path))]
            is_ours = (
                entry.name in folders
                or is_draft_folder(entry.name)
                or all(layout.STEP_NAME.fullmatch(name) or name.startswith(TEMPORARY) for name in inner)
            )
        else:
            is_ours = entry.name in _RUN_FILES or bool(_OTHER_FILES.fullmatch(entry.name)) or is_draft(entry.name)
        if not is_ours:
            return False
    return True


def _foreign_content(checkpoint: Path) -> str | None:
    """Return what is said of a checkpoint with files in it that its manifest does not list."""
    listed = set(_CHECKPOINT_FILES)
    with suppress(CheckpointError):
        listed = {*verify.read_manifest(checkpoint, FileSystem()).files, manifest.NAME}
    others = list(_others(checkpoint, listed))
    return f"it holds {', '.join(others[:3])}, which is not its own" if others else None


def _unknown_checkpoints(folder: Path) -> Iterable[str]:
    for entry in _entries(folder):
        if entry.is_dir() and not entry.is_symlink() and layout.STEP_NAME.fullmatch(entry.name):
            yield from (f"{entry.name}/{other}" for other in _others(Path(entry.path), _CHECKPOINT_FILES))
        elif not entry.name.startswith(TEMPORARY):
            yield entry.name


def _not_synced(folder: Path) -> Iterable[str]:
    """Return the offline runs of W&B that no server has yet: `wandb sync` leaves a marker in those that it uploaded."""
    for entry in _entries(folder):
        inner = _entries(Path(entry.path))
        if entry.name.startswith("offline-run-") and not any(file.name.endswith(".synced") for file in inner):
            yield entry.name


def _others(folder: Path, known: set[str]) -> Iterable[str]:
    with suppress(OSError, RunnerError):
        yield from unexpected_names(folder, known)
        yield from (e.name for e in _entries(folder) if e.name in known and (e.is_symlink() or not e.is_file()))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted((e for e in entries if not is_apple_double(e.name)), key=lambda entry: entry.name)
    return []
