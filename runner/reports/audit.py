"""Verification of checkpoints, runs and sweeps from their files alone, without loading a model.

Every byte of every checkpoint is compared with its manifest, values must be finite, rows must be readable, and what
the newest checkpoint relies on must be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.checkpoints import mirror, verify
from runner.checkpoints.retention import best_checkpoint
from runner.checkpoints.safetensors_file import require_finite, unpack
from runner.checkpoints.verify import CheckpointRecord
from runner.common import safe_json
from runner.common.errors import CheckpointError, RunnerError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTERS
from runner.common.text import shorten
from runner.config import resume_policy, serialize
from runner.reports.checkpoint_list import checkpoints_folder, step_folders
from runner.runs.directory import RunDirectory
from runner.runs.inspect import RunInfo
from runner.runs.rows import scan_rows

_MAX_ADAPTER_BYTES = 1 << 40
"""Of an adapter without a manifest."""
_MAX_JSON_VALUES = 5_000_000
_TEMPORARY = (".tmp-", ".old-", ".del-")
"""Prefixes of what a save or a rotation leaves that was killed."""


@dataclass
class Audit:
    """What was found in one checkpoint, result, run, backup or sweep."""

    path: Path
    kind: str
    """checkpoint, result, run, backup or sweep."""
    state: str = ""
    damage: list[str] = field(default_factory=list)
    """One sentence for each damaged file, with its path."""
    notes: list[str] = field(default_factory=list)
    """What is no damage but worth knowing."""
    whole: list[int] = field(default_factory=list)
    """Steps of the undamaged checkpoints, in order."""
    best: int | None = None
    """The one of these with the lowest validation loss."""
    checkpoints: int = 0
    """Number of checkpoints verified."""
    size_bytes: int = 0
    """Size of the checkpoints and the result."""
    has_settings: bool = True
    """Whether config.yaml can be read, without which a run can be neither resumed nor repeated."""
    backup: Path | None = None
    """The backup of a damaged run."""


def audit_checkpoint(path: Path) -> Audit:
    """Verify the checkpoint, or another folder with a manifest, at `path`."""
    audit = Audit(path, "checkpoint", checkpoints=1)
    checkpoint, _ = _verify_folder(path, audit)
    if checkpoint:
        audit.whole = [checkpoint.step]
    return audit


def audit_result(path: Path) -> Audit:
    """Verify a run's adapters/ at `path`."""
    audit = Audit(path, "result")
    _verify_result(path, audit)
    return audit


def audit_run(run: RunInfo) -> Audit:
    """Verify everything in a run's directory. What a process that works on it changes meanwhile is no damage."""
    directory = RunDirectory(run.path, checkpoints_folder(run).name)
    is_locked = directory.is_locked()
    audit = Audit(run.path, "backup" if mirror.is_backup(run.path) else "run", run.state)
    audit.has_settings = bool(run.settings)
    if run.problem:
        audit.damage += [f"{run.path}: {problem}" for problem in run.problem.split("; ")]
    checkpoints = _verify_checkpoints(run, directory.checkpoints, audit, is_locked)
    audit.whole = [checkpoint.step for checkpoint, _ in checkpoints]
    best = best_checkpoint(checkpoint.manifest for checkpoint, _ in checkpoints)
    audit.best = best.step if best else None
    newest_state = checkpoints[-1][1] if checkpoints else {}
    _verify_rows(directory.metrics, newest_state.get("metrics_offset"), audit, is_locked)
    _verify_rows(directory.samples, newest_state.get("samples_offset"), audit, is_locked)
    _verify_rows(directory.row_losses, newest_state.get("row_losses_offset"), audit, is_locked, optional=True)
    last = run.status.get("last_checkpoint")
    newest = checkpoints[-1][0].step if checkpoints else -1
    if run.status.get("cleaned") and newest < (last if safe_json.is_count(last) else 0):
        which = f"those after step {newest}: " if checkpoints else ""
        audit.notes.append(f"{directory.checkpoints}: {which}removed by runner clean; the result is left")
    elif last and not checkpoints:
        audit.damage.append(f"{directory.checkpoints}: step {last} was saved, none is whole")
    if newest_state and run.settings:
        _compare_settings(run, newest_state, audit)
    if directory.result.is_dir():
        _verify_result(directory.result, audit)
    elif run.state == "finished" and (checkpoints or run.status.get("cleaned")) and audit.kind == "run":
        audit.damage.append(f"{directory.result}: missing, though the run is finished")
    root, run_id = run.settings.get("checkpoint.backup"), run.status.get("run_id")
    if audit.damage and audit.kind == "run" and isinstance(root, str) and isinstance(run_id, str):
        audit.backup = mirror.find_backup(Path(root).expanduser(), run_id)
    return audit


def _verify_checkpoints(
    run: RunInfo, folder: Path, audit: Audit, is_locked: bool
) -> list[tuple[CheckpointRecord, dict[str, Any]]]:
    """Return the run's undamaged checkpoints in `folder`, by step, with the content of their train_state.json."""
    filesystem, run_id = FileSystem(), run.status.get("run_id")
    try:
        names = filesystem.listdir(folder) if filesystem.lstat(folder) else []
    except RunnerError as error:
        audit.damage.append(str(error))
        return []
    temporary = sum(name.startswith(_TEMPORARY) for name in names)
    if temporary:
        audit.notes.append(f"{folder}: {temporary} temporary folders of an interrupted save; a resume removes them")
    checkpoints = []
    for path in step_folders(folder, names):
        damage = len(audit.damage)
        checkpoint, state = _verify_folder(path, audit)
        if is_locked and not path.exists():  # rotated while it was read
            del audit.damage[damage:]
            continue
        audit.checkpoints += 1
        if checkpoint is None:
            continue
        if isinstance(run_id, str) and checkpoint.manifest.run_id != run_id:
            audit.notes.append(f"{path}: left by another run")
        else:
            checkpoints.append((checkpoint, state))
    return checkpoints


def _verify_folder(path: Path, audit: Audit) -> tuple[CheckpointRecord | None, dict[str, Any]]:
    """Verify a folder with a manifest; return its record, None where it is damaged, and its train_state.json."""
    state: dict[str, Any] = {}
    try:
        loaded = verify.load_checkpoint(path, FileSystem())
        audit.size_bytes += sum(len(data) for data in loaded.files.values())
        for name, data in loaded.files.items():
            if name.endswith(".safetensors"):
                require_finite(unpack(data, where=str(path / name))[0], where=str(path / name))
            elif name.endswith(".json"):
                parsed = _parse_object(data, path / name)
                state = parsed if name == "train_state.json" else state
        return loaded.checkpoint, state
    except RunnerError as error:
        audit.damage.append(str(error))
        return None, {}


def _verify_result(path: Path, audit: Audit) -> None:
    filesystem = FileSystem()
    try:
        if filesystem.lstat(path / "manifest.json") is not None:
            _verify_folder(path, audit)
            return
        # Written by an older version or another program.
        data = filesystem.read_file(path / ADAPTERS, _MAX_ADAPTER_BYTES)
        audit.size_bytes += len(data)
        require_finite(unpack(data, where=str(path / ADAPTERS))[0], where=str(path / ADAPTERS))
        audit.notes.append(f"{path}: has no manifest, so only its format was verified")
    except RunnerError as error:
        audit.damage.append(str(error))


def _parse_object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        return safe_json.parse_object(data, max_values=_MAX_JSON_VALUES)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _verify_rows(path: Path, needed: object, audit: Audit, is_locked: bool, *, optional: bool = False) -> None:
    """Verify that the file of rows is readable, and has the `needed` bytes that the newest checkpoint counts; without
    these, a resume begins an `optional` one anew."""
    try:
        entry = FileSystem().lstat(path)
        size = entry.size if entry else 0
        if isinstance(needed, int) and size < needed and optional:
            audit.notes.append(f"{path}: {size:,} of {needed:,} bytes; a resume begins it anew, for `compare` alone")
        elif isinstance(needed, int) and size < needed:
            audit.damage.append(f"{path}: {size:,} bytes, the newest checkpoint relies on {needed:,}")
        if entry is None:
            return
        if entry.kind != "file":
            audit.damage.append(f"{path}: {verify.KIND_TEXT[entry.kind]}, not a file")
            return
        for line in scan_rows(path):
            if line.torn:
                if not is_locked:
                    audit.notes.append(f"{path}: its last line is torn; a resume drops it")
            elif line.row is None:
                audit.damage.append(f"{path}, line {line.number}: not a row")
                return
    except (RunnerError, OSError) as error:
        audit.damage.append(str(error))


def _compare_settings(run: RunInfo, state: Mapping[str, Any], audit: Audit) -> None:
    """Report frozen settings that differ between config.yaml and the newest checkpoint."""
    trained = state.get("hyperparameters")
    if not isinstance(trained, dict):
        return
    for name in serialize.default_settings():
        if name not in trained or name not in run.settings or resume_policy.is_free_on_resume(name):
            continue
        if trained[name] != run.settings[name]:
            stored, used = (shorten(serialize.format_value(value)) for value in (run.settings[name], trained[name]))
            audit.damage.append(
                f"{run.path / 'config.yaml'}: {name} is {stored}, but the newest checkpoint was trained with {used}"
            )
