"""The checkpoints of a run as a person wants to see them: which there are, why each stays, which is the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints import verify
from runner.checkpoints.manifest import CheckpointManifest
from runner.checkpoints.retention import RetentionPolicy, RetentionReason, SavedStep, select_retained, valid_loss
from runner.checkpoints.verify import STEP_NAME
from runner.common.errors import RunnerError
from runner.common.filesystem import FileSystem
from runner.config.schema import CheckpointConfig
from runner.runs.inspect import RunInfo, folder_size
from runner.runs.layout import ADAPTERS

_MOST_HASHED = 256_000_000  # bytes: a fraction of a second


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint, by its manifest; its other files are not verified."""

    step: int
    path: Path
    valid_loss: float | None = None
    size_bytes: int = 0
    kept_for: tuple[str, ...] = ()
    """Why the retention keeps it; empty: the next save lets it go, or it is not this run's to remove."""
    problem: str | None = None
    """Why it is none of this run's sound checkpoints."""


def list_checkpoints(run: RunInfo) -> list[CheckpointInfo]:
    """The checkpoints in a run's directory, by step."""
    disk, folder = FileSystem(), checkpoints_folder(run)
    manifests: dict[int, CheckpointManifest] = {}
    problems: dict[Path, str] = {}
    for path in _folders(folder, disk):
        try:
            record = verify.read_manifest(path, disk)
            manifests[record.step] = record
        except RunnerError as error:
            problems[path] = str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/")
    run_id = run.status.get("run_id") or (manifests[max(manifests)].run_id if manifests else None)
    own = {step: record for step, record in manifests.items() if record.run_id == run_id}
    policy = _policy(run)
    reasons = select_retained([SavedStep.of(record) for record in own.values()], policy)
    found = []
    for path in _folders(folder, disk):
        step = int(path.name.removeprefix("step-"))
        problem = problems.get(path) or (None if step in own else "left by another run")
        found.append(
            CheckpointInfo(
                step=step,
                path=path,
                valid_loss=valid_loss(manifests[step]) if step in manifests else None,
                size_bytes=folder_size(path),
                kept_for=tuple(_reason_text(reason, policy) for reason in reasons.get(step, ())),
                problem=problem,
            )
        )
    return found


def result_step(run: RunInfo, checkpoints: list[CheckpointInfo]) -> int | None:
    """The step that adapters/ was made from: as status.json says, else the checkpoint with the same adapter."""
    adapter = run.path / "adapters" / ADAPTERS
    disk = FileSystem()
    try:
        there = disk.lstat(adapter)
        if there is None or there.kind != "file":
            return None
        told = run.status.get("result_step")
        if type(told) is int:
            return told
        if there.size > _MOST_HASHED:
            return None
        _, digest = disk.sha256(adapter)
        for one in checkpoints:
            if one.problem is None and verify.read_manifest(one.path, disk).files[ADAPTERS].sha256 == digest:
                return one.step
    except (RunnerError, KeyError):
        return None
    return None


def checkpoints_folder(run: RunInfo) -> Path:
    """Where the run keeps its checkpoints; a name that would lead out of its directory is not followed."""
    name = run.settings.get("checkpoint.dir")
    plain = isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
    return run.path / (str(name) if plain else CheckpointConfig().dir)


def _folders(folder: Path, disk: FileSystem) -> list[Path]:
    try:
        there = disk.lstat(folder)
        if there is None or there.kind != "folder":
            return []
        names = [name for name in disk.listdir(folder) if STEP_NAME.fullmatch(name)]
    except RunnerError:
        return []
    return [folder / name for name in sorted(names, key=lambda name: int(name.removeprefix("step-")))]


def _reason_text(reason: RetentionReason, policy: RetentionPolicy) -> str:
    return f"every {policy.keep_every}" if reason is RetentionReason.EVERY else reason.value


def _policy(run: RunInfo) -> RetentionPolicy:
    defaults = CheckpointConfig()

    def chosen(name: str) -> Any:
        value = run.settings.get(f"checkpoint.{name}", getattr(defaults, name))
        return value if type(value) is int or value is None else getattr(defaults, name)

    try:
        return RetentionPolicy(chosen("keep_last") or 0, chosen("keep_best") or 0, chosen("keep_every"))
    except ValueError:
        return RetentionPolicy(defaults.keep_last, defaults.keep_best, defaults.keep_every)
