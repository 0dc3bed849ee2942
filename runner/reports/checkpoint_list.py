"""The checkpoints of a run for a person: which there are, why each is retained, which one is the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints import verify
from runner.checkpoints.manifest import CheckpointManifest
from runner.checkpoints.retention import RetentionPolicy, RetentionReason, select_retained
from runner.common.errors import RunnerError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTERS, STEP_NAME
from runner.config.schema import CheckpointConfig
from runner.runs.inspect import RunInfo, folder_size

_MAX_HASHED_BYTES = 256_000_000
"""An adapter of this size is hashed in a fraction of a second."""


LEFT_BY_ANOTHER_RUN = "left by another run"
"""The problem of a checkpoint whose manifest names another run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint as its manifest describes it; its other files are not verified. The fields of `show --json`."""

    step: int
    path: Path
    valid_loss: float | None = None
    size_bytes: int = 0
    saved_for: tuple[str, ...] = ()
    """Why it was saved, such as "every 100 updates"."""
    kept_for: tuple[str, ...] = ()
    """Why it is retained; empty if the next save removes it, or if it belongs to another run."""
    problem: str | None = None
    """Why the run cannot resume from it."""


def list_checkpoints(run: RunInfo) -> list[CheckpointInfo]:
    """Return the checkpoints in a run's directory, by step."""
    filesystem, folder = FileSystem(), checkpoints_folder(run)
    try:
        paths = [] if folder.is_symlink() else step_folders(folder, filesystem.listdir(folder))
    except RunnerError:
        return []
    manifests: dict[Path, CheckpointManifest] = {}
    problems: dict[Path, str] = {}
    for path in paths:
        try:
            manifests[path] = verify.read_manifest(path, filesystem)
        except RunnerError as error:
            problems[path] = str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/")
    run_id = run.status.get("run_id") or next((manifests[p].run_id for p in reversed(paths) if p in manifests), None)
    problems |= {path: LEFT_BY_ANOTHER_RUN for path, found in manifests.items() if found.run_id != run_id}
    policy = _retention_policy(run)
    of_run = {found.step: found for path, found in manifests.items() if path not in problems}
    reasons = select_retained(list(of_run.values()), policy)
    texts = {reason: reason.value for reason in RetentionReason} | {RetentionReason.EVERY: f"every {policy.keep_every}"}
    checkpoints = []
    for path in paths:
        step = _step_of(path)
        retained = reasons.get(step, []) if path not in problems else []
        checkpoints.append(
            CheckpointInfo(
                step=step,
                path=path,
                valid_loss=manifests[path].valid_loss if path in manifests else None,
                size_bytes=folder_size(path),
                saved_for=manifests[path].save_reasons if path in manifests else (),
                kept_for=tuple(texts[reason] for reason in retained),
                problem=problems.get(path),
            )
        )
    return checkpoints


def result_step(run: RunInfo, checkpoints: list[CheckpointInfo]) -> int | None:
    """Return the step of the adapter in adapters/: from status.json, else that of the checkpoint of equal content."""
    adapter = run.path / "adapters" / ADAPTERS
    filesystem = FileSystem()
    try:
        entry = filesystem.lstat(adapter)
        if entry is None or entry.kind != "file":
            return None
        recorded = run.status.get("result_step")
        if type(recorded) is int:
            return recorded
        if entry.size > _MAX_HASHED_BYTES:
            return None
        _, digest = filesystem.sha256(adapter)
        for checkpoint in checkpoints:
            if checkpoint.problem is None:
                manifest = verify.read_manifest(checkpoint.path, filesystem)
                if manifest.files[ADAPTERS].sha256 == digest:
                    return checkpoint.step
    except (RunnerError, KeyError):
        return None
    return None


def checkpoints_folder(run: RunInfo) -> Path:
    """Return the folder of the run's checkpoints; a stored name that leads out of the run's directory is ignored.

    Where config.yaml is lost, it is the folder in which checkpoints are found.
    """
    name = run.settings.get("checkpoint.dir")
    if isinstance(name, str) and Path(name).name == name and name not in ("", ".", ".."):
        return run.path / name
    default = run.path / CheckpointConfig().dir
    if run.settings or default.is_dir():
        return default
    found = sorted(path.parent for path in run.path.glob("*/step-*") if STEP_NAME.fullmatch(path.name))
    return next((folder for folder in found if not folder.is_symlink()), default)


def step_folders(folder: Path, names: list[str]) -> list[Path]:
    """Return the paths of those `names` in `folder` that are checkpoints, by step."""
    return sorted((folder / name for name in names if STEP_NAME.fullmatch(name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _retention_policy(run: RunInfo) -> RetentionPolicy:
    """Return the run's policy; invalid values are replaced by the defaults."""
    defaults = CheckpointConfig()

    def setting(name: str, minimum: int) -> Any:
        default = getattr(defaults, name)
        value = run.settings.get(f"checkpoint.{name}", default)
        return value if value is None or (type(value) is int and value >= minimum) else default

    return RetentionPolicy(setting("keep_last", 0) or 0, setting("keep_best", 0) or 0, setting("keep_every", 1))
