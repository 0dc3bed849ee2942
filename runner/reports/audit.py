"""What is damaged in checkpoints, runs and sweeps, found from their files alone: no model is loaded. No MLX.

Every byte of every checkpoint is compared with its manifest; numbers are finite, rows can be read, and what a
checkpoint counts on is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.checkpoints import mirror, verify
from runner.checkpoints.retention import best_checkpoint
from runner.checkpoints.safetensors_file import unpack
from runner.checkpoints.verify import STEP_NAME, CheckpointRecord
from runner.common import safe_json
from runner.common.errors import CheckpointError, RunnerError
from runner.common.filesystem import FileSystem
from runner.common.text import shorten
from runner.config import resume_policy, schema
from runner.reports.checkpoint_list import checkpoints_folder
from runner.runs.directory import RunDirectory
from runner.runs.inspect import RunInfo
from runner.runs.layout import ADAPTERS
from runner.runs.rows import scan_rows

_LARGEST = 1 << 40  # bytes of a file that has no manifest
_MOST_VALUES = 5_000_000
_LEFTOVERS = (".tmp-", ".old-", ".del-")


@dataclass
class Audit:
    """What was found in one checkpoint or run."""

    path: Path
    kind: str
    """checkpoint, result, run, backup or sweep."""
    state: str = ""
    damage: list[str] = field(default_factory=list)
    """A sentence for each thing that is damaged, with its path."""
    notes: list[str] = field(default_factory=list)
    """What is no damage and yet worth knowing."""
    whole: list[int] = field(default_factory=list)
    """Steps of the checkpoints that are whole, in order."""
    best: int | None = None
    """Of these, the one of the lowest validation loss."""
    checkpoints: int = 0
    """How many were looked at."""
    size_bytes: int = 0
    """Of the checkpoints and the result."""
    backup: Path | None = None
    """Where a backup of a run lies that has damage."""


def of_checkpoint(path: Path) -> Audit:
    """The checkpoint, or other folder with a manifest, at `path`."""
    audit = Audit(path, "checkpoint", checkpoints=1)
    found = _checkpoint(path, audit)
    if found:
        audit.whole = [found.step]
    return audit


def of_result(path: Path) -> Audit:
    """A run's adapters/ at `path`."""
    audit = Audit(path, "result")
    _result(path, audit)
    return audit


def of_run(run: RunInfo) -> Audit:
    """Everything in a run's directory. What a process that works on it changes meanwhile is no damage."""
    directory = RunDirectory(run.path, checkpoints_folder(run).name)
    working = directory.is_locked()
    audit = Audit(run.path, "backup" if mirror.is_backup(run.path) else "run", run.state)
    if run.problem:
        audit.damage += [f"{run.path}: {line}" for line in run.problem.split("; ")]
    run_id = run.status.get("run_id")
    own: list[tuple[CheckpointRecord, dict[str, Any]]] = []
    for path in _entries(directory.checkpoints, audit):
        state: dict[str, Any] = {}
        before = len(audit.damage)
        found = _checkpoint(path, audit, state)
        if working and not path.exists():  # rotated while it was read
            del audit.damage[before:]
            continue
        audit.checkpoints += 1
        if found is None:
            continue
        if isinstance(run_id, str) and found.run_id != run_id:
            audit.notes.append(f"{path}: left by another run")
        else:
            own.append((found, state))
    audit.whole = [found.step for found, _ in own]
    best = best_checkpoint(checkpoint for checkpoint, _ in own)
    audit.best = best.step if best else None
    newest = own[-1][1] if own else {}
    _rows(directory.metrics, newest.get("metrics_offset"), audit, working)
    _rows(directory.samples, newest.get("samples_offset"), audit, working)
    if not own and run.status.get("last_checkpoint"):
        audit.damage.append(f"{directory.checkpoints}: step {run.status['last_checkpoint']} was saved, none is whole")
    if newest and run.settings:
        _compare_settings(run, newest, audit)
    if directory.result.is_dir():
        _result(directory.result, audit)
    elif run.state == "finished" and own and audit.kind == "run":
        audit.damage.append(f"{directory.result}: missing, though the run is finished")
    root = run.settings.get("checkpoint.backup")
    if audit.damage and audit.kind == "run" and isinstance(root, str) and isinstance(run_id, str):
        audit.backup = mirror.find_backup(Path(root).expanduser(), run_id)
    return audit


def _entries(folder: Path, audit: Audit) -> Iterator[Path]:
    """The checkpoints in `folder` by step; what a crash left is noted."""
    disk = FileSystem()
    try:
        there = disk.lstat(folder)
        if there is None:
            return
        names = disk.listdir(folder)
    except RunnerError as error:
        audit.damage.append(str(error))
        return
    leftovers = [name for name in names if name.startswith(_LEFTOVERS)]
    if leftovers:
        audit.notes.append(f"{folder}: {len(leftovers)} leftovers of a save that was cut off; a resume clears them")
    steps = [name for name in names if STEP_NAME.fullmatch(name)]
    yield from (folder / name for name in sorted(steps, key=lambda name: int(name.removeprefix("step-"))))


def _checkpoint(path: Path, audit: Audit, state: dict[str, Any] | None = None) -> CheckpointRecord | None:
    """Verify `path`; what its train_state.json says goes to `state`."""
    try:
        loaded = verify.load_checkpoint(path, FileSystem())
        audit.size_bytes += sum(len(data) for data in loaded.files.values())
        for name, data in loaded.files.items():
            if name.endswith(".safetensors"):
                _require_finite(data, path / name)
            elif name.endswith(".json"):
                read = _parse(data, path / name)
                if name == "train_state.json" and state is not None:
                    state.update(read)
        return loaded.checkpoint
    except RunnerError as error:
        audit.damage.append(str(error))
        return None


def _result(path: Path, audit: Audit) -> None:
    disk = FileSystem()
    try:
        if disk.lstat(path / "manifest.json") is None:  # made by an older version, or by another program
            data = disk.read_file(path / ADAPTERS, _LARGEST)
            audit.size_bytes += len(data)
            _require_finite(data, path / ADAPTERS)
            audit.notes.append(f"{path}: has no manifest, so only its form was looked at")
            return
    except RunnerError as error:
        audit.damage.append(str(error))
        return
    _checkpoint(path, audit)


def _require_finite(data: bytes, where: Path) -> None:
    for name, tensor in unpack(data, where=str(where))[0].items():
        if not tensor.is_finite():
            raise CheckpointError(f"{where}: {name} holds values that are not finite")


def _parse(data: bytes, where: Path) -> dict[str, Any]:
    try:
        found = safe_json.parse(data, max_values=_MOST_VALUES)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: not an object")
    return found


def _rows(path: Path, needed: object, audit: Audit, working: bool) -> None:
    """The row file `path`: readable, and as long as the newest checkpoint counts on."""
    disk = FileSystem()
    try:
        there = disk.lstat(path)
        size = there.size if there else 0
        if isinstance(needed, int) and size < needed:
            audit.damage.append(f"{path}: {size:,} bytes, the newest checkpoint counts on {needed:,}")
        if there is None:
            return
        if there.kind != "file":
            audit.damage.append(f"{path}: {verify.kind_text(there.kind)}, not a file")
            return
        for line in scan_rows(path):
            if line.torn:
                if not working:
                    audit.notes.append(f"{path}: its last line is torn; a resume drops it")
            elif line.row is None:
                audit.damage.append(f"{path}, line {line.number}: not a row")
                return
    except (RunnerError, OSError) as error:
        audit.damage.append(str(error))


def _compare_settings(run: RunInfo, state: dict[str, Any], audit: Audit) -> None:
    """Whether config.yaml still says what the newest checkpoint was trained with, of what a resume may not change."""
    then = state.get("hyperparameters")
    if not isinstance(then, dict):
        return
    for name in schema.default_settings():
        if name in then and name in run.settings and not resume_policy.is_free_on_resume(name):
            old, new = then[name], run.settings[name]
            if old != new:
                here, there = (shorten(schema.format_value(value)) for value in (new, old))
                audit.damage.append(
                    f"{run.path / 'config.yaml'}: {name} is {here}, and the newest checkpoint was trained with {there}"
                )
