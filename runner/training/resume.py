"""Which checkpoint a run resumes from, and whether it may: it verifies, is of this run, and its inputs are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from runner.checkpoints import mirror, verify
from runner.checkpoints.store import CheckpointStore
from runner.checkpoints.verify import CheckpointRecord, LoadedCheckpoint
from runner.common.atomic_io import repair_replaced_folder
from runner.common.commands import repeat_command, resume_command, warm_start_command
from runner.common.errors import CheckpointError, ConfigError
from runner.common.filesystem import FileSystem
from runner.common.safe_json import is_count
from runner.common.text import shorten
from runner.config import environment, resume_policy, serialize, validation
from runner.config.schema import Config
from runner.models.load import BaseModel
from runner.runs.lineage import BRANCH, parents_of
from runner.runs.run_spec import RunSpec, find_resume_source
from runner.training import legacy_window, state_files
from runner.training.component_loader import ComponentLoader
from runner.training.signals import StopSignals
from runner.training.state_files import RunIdentity, SavedState

_ENVIRONMENT_NAMES = {
    "mlx_lm": "mlx-lm",
    "blas.library": "BLAS",
    "blas.threads": "number of BLAS threads",
    "blas.core": "BLAS core type",
    "engine": "CPU engine",
    "compiled": "compiled step",
    "loss_piece": "train.loss_chunk",
    "head": "train.head",
    "trunk": "number of blocks in the hidden-state cache",
    "cpu_ops": "cross-entropy in NumPy",
    "tf32": "TF32 (MLX_ENABLE_TF32)",
    "macos": "macOS",
}
"""What messages call the keys of a checkpoint's numeric environment; the others are shown as they are."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from."""

    checkpoint: CheckpointRecord
    saved: SavedState
    messages: list[str]
    """What was repaired, skipped as damaged, or changed in the config."""
    config_changed: bool
    branched_from: Path | None = None
    """The run that the checkpoint is of, where that is another one: of a branch that has none of its own yet."""


def find_resume_point(spec: RunSpec) -> tuple[RunSpec, ResumePoint | None]:
    """Return `spec`, completed from the run that it resumes, and the verified checkpoint to resume from.

    A run that resumes in its own directory keeps its run id. It keeps what model.dtype and model.dequantize on auto
    meant when it began, on any device. A branch that was killed before its first checkpoint begins again from the one
    that it branched from. Where an earlier version left data.window to the backend, it is the one that the
    checkpoint records. Without a checkpoint (None) the run starts from the beginning.

    Raises:
        CheckpointError: there are checkpoints and none is valid, or the one that was named is damaged.
        ConfigError: a frozen setting changed, in the overrides or in config.yaml.
    """
    source = spec.source
    if source is None:
        return spec, None
    previous = _previous_config(spec)
    # Before the checkpoints are read: their folder is a setting too.
    resume_policy.refuse_frozen_changes(
        legacy_window.fill_window(previous, spec.config.data.window), spec.config, source.run
    )
    messages: list[str] = []
    newest: tuple[LoadedCheckpoint, SavedState] | None = None
    branch_point = source.checkpoint
    if branch_point is None:
        spec = replace(spec, run_id=_stored_run_id(spec))
        newest, messages = _newest_valid(spec)
        branch_point = None if newest else _branch_point(spec)
        if newest is None and branch_point is None:
            return spec, None
    if branch_point is not None:
        loaded = verify.load_checkpoint(branch_point, FileSystem())
        newest = loaded, state_files.read_state(loaded)
    assert newest is not None
    loaded, saved = newest
    spec = replace(spec, config=legacy_window.fill_window(spec.config, saved.window))
    previous = legacy_window.fill_window(previous, saved.window or spec.config.data.window)
    resume_policy.refuse_frozen_changes(previous, spec.config, source.run, saved.progress.step)
    _refuse_edited_config(spec, saved)
    _refuse_changed_environment(spec, saved)
    changes = _change_messages(spec, previous)
    spec = replace(spec, precision=saved.identity.precision)
    branched_from = None if branch_point is None else find_resume_source(branch_point).run
    messages += changes
    return spec, ResumePoint(
        loaded.checkpoint, saved, messages, config_changed=bool(changes), branched_from=branched_from
    )


def is_already_finished(spec: RunSpec, point: ResumePoint) -> bool:
    """Return whether a finished run is resumed without changes, so that nothing is left to train."""
    if point.config_changed or spec.source is None or spec.source.branch:
        return False
    status = spec.directory.read_status()
    return bool(status.get("ended")) and status["state"] == "finished"


def require_same_inputs(spec: RunSpec, point: ResumePoint, loader: ComponentLoader, stops: StopSignals) -> None:
    """Load the model and the data, and refuse them if the checkpoint was trained on others.

    Raises:
        ConfigError: a fingerprint differs.
        ModelError, DataError: they cannot be loaded.
        StopRequested: a stop signal arrived meanwhile.
    """
    assert spec.source is not None
    base = loader.base(spec.config.model, spec.precision)
    data = loader.data(spec.config, base, stops.check)
    saved = point.saved.identity.fingerprints
    current = {"model": base.fingerprint, "data_train": data.train.fingerprint, "data_valid": data.valid.fingerprint}
    if data.mixture or "data_mix" in saved:
        current["data_mix"] = data.mixture.fingerprint if data.mixture else "none"
    problems = {
        "data_mix": "the sources or the weights of data.mix changed",
        "model": "the base model has other weights",
        "data_train": "the training data changed",
        "data_valid": "the validation data changed",
    }
    lines = [
        f"{problem}: the fingerprint was {saved.get(name, 'none')[:16]} and is {current[name][:16]}."
        for name, problem in problems.items()
        if name in current and saved.get(name) != current[name]
    ]
    if lines:
        if saved.get("model") != base.fingerprint:
            lines += [*base.differs_from_earlier_versions, *_device_reason(spec, point.saved.identity, base)]
        command = warm_start_command(spec.source.run, point.checkpoint.path)
        lines.append(f"To start a new run on them from these weights: {command}")
        raise ConfigError(f"{point.checkpoint.path} cannot be resumed:\n" + "\n".join(lines))


def numeric_differences(saved: RunIdentity, current: RunIdentity) -> list[str]:
    """Return a text for each difference of the numeric environment, which may change the last digits of results.

    Only what both record is compared: backends and versions do not all record the same.
    """
    before = serialize.flatten_dict(saved.numeric_environment)
    after = serialize.flatten_dict(current.numeric_environment)
    return [
        f"{_ENVIRONMENT_NAMES.get(key, key)} was {_environment_text(before[key])}, is {_environment_text(value)}"
        for key, value in after.items()
        if key in before and before[key] != value
    ]


def _device_reason(spec: RunSpec, saved: RunIdentity, base: BaseModel) -> list[str]:
    """Return what tells that the base may differ because it was converted on another device than this one."""
    before, now = saved.numeric_environment.get("device"), str(mx.default_device())
    as_stored = base.precision == {"dtype": "native", "dequantize": "never"} and spec.config.model.quantize.bits is None
    if not isinstance(before, str) or before == now or as_stored:
        return []
    return [
        f"The checkpoint is of {shorten(before)}, this is {now}, and the base is converted while it is loaded, which "
        "two devices may round differently. Resume it on such a device."
    ]


def _environment_text(value: object) -> str:
    return "none" if value is None else shorten(value)


def _stored_run_id(spec: RunSpec) -> str:
    """Return the id of the run in `spec.directory`; if status.json is lost, the checkpoints know it."""
    run_id = spec.directory.read_status().get("run_id")
    if isinstance(run_id, str):
        return run_id
    checkpoints = CheckpointStore(spec.directory.checkpoints, "").checkpoints()
    if len({checkpoint.manifest.run_id for checkpoint in checkpoints}) > 1:
        names = ", ".join(f"{checkpoint.path.name} of {checkpoint.manifest.run_id}" for checkpoint in checkpoints)
        raise CheckpointError(
            f"{spec.directory.status} is lost, and the checkpoints are of several runs: {names}. "
            f"Name the one to resume from: {resume_command(checkpoints[-1].path)}"
        )
    return checkpoints[-1].manifest.run_id if checkpoints else spec.run_id


def _newest_valid(spec: RunSpec) -> tuple[tuple[LoadedCheckpoint, SavedState] | None, list[str]]:
    """Return the run's newest valid checkpoint with its decoded state, and messages about repairs and damage."""
    directory = spec.directory
    store = CheckpointStore(directory.checkpoints, spec.run_id)
    repair_replaced_folder(directory.result, FileSystem())
    messages = store.repair()
    decoded: list[SavedState] = []
    loaded, damage = store.newest_valid(check=lambda loaded: decoded.append(state_files.read_state(loaded)))
    status = directory.read_status()
    if loaded is not None:
        messages += [f"damaged, not used: {line}" for line in damage]
        messages += [] if damage else _gone_message(status, loaded.checkpoint.step)
        return (loaded, decoded[-1]), messages
    if not damage and status.get("cleaned"):
        raise _cleaned_error(directory.path, str(status["cleaned"]))
    last_step = status.get("last_checkpoint")
    if not damage and last_step:
        damage = [f"{directory.checkpoints}: step {last_step} was saved and is gone"]
    if damage:
        raise CheckpointError(
            "\n".join(
                [
                    *damage,
                    f"No checkpoint of {directory.path} is valid, and a run never starts over silently.",
                    *_backup_commands(spec),
                    f"To train again with the same settings: {repeat_command(directory.path)}",
                ]
            )
        )
    return None, messages


def _branch_point(spec: RunSpec) -> Path | None:
    """Return the checkpoint that a run without one of its own branched from; None where it began by itself.

    Raises:
        CheckpointError: that checkpoint is gone, or is now another run's.
    """
    status = spec.directory.read_status()
    parent = status.get("parent")
    if not isinstance(parent, str):
        return None
    known = {found.run_id for found in parents_of(status) if found.how == BRANCH} - {None}
    try:
        found = verify.load_checkpoint(Path(parent), FileSystem()).checkpoint.manifest.run_id
        problem = "is now of another run" if known and found not in known else ""
    except CheckpointError as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise CheckpointError(
            f"{spec.directory.path} has no checkpoint of its own yet, and the one that it branched from {problem}: "
            f"{parent}. A branch never starts over from the beginning silently.\n"
            f"To train with the same settings from the beginning: {repeat_command(spec.directory.path)}"
        )
    return Path(parent)


def _gone_message(status: Mapping[str, Any], step: int) -> list[str]:
    """Return what is said of a run that resumes at `step` where a later one was saved and is gone."""
    last = status.get("last_checkpoint")
    if not is_count(last) or last <= step:
        return []
    reason = (
        "`runner clean` removed its newer checkpoints" if status.get("cleaned") else "its newer checkpoints are gone"
    )
    return [f"resumes from step {step}, though step {last} was saved: {reason}"]


def _cleaned_error(run: Path, when: str) -> ConfigError:
    return ConfigError(
        f"{run} cannot be resumed: `runner clean` removed its checkpoints ({shorten(when, 40)}). Its result is left.\n"
        f"To start a new run from that: {warm_start_command(run, run / 'adapters')}\n"
        f"To train again with the same settings: {repeat_command(run)}"
    )


def _backup_commands(spec: RunSpec) -> list[str]:
    root = spec.config.checkpoint.backup
    backup = mirror.find_backup(Path(root).expanduser(), spec.run_id) if root else None
    return [f"To resume from its backup: {resume_command(backup)}"] if backup else []


def _previous_config(spec: RunSpec) -> Config:
    """Return the config that the source run has stored, with values of the environment resolved as in this run."""
    assert spec.source is not None
    resolved = _resolve_environment(spec.source.config, spec.stored, serialize.to_dict(spec.config))
    return validation.fill_defaults(serialize.from_dict(resolved, str(spec.source.run / "config.yaml")))


def _resolve_environment(
    previous: Mapping[str, Any], stored: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace each ${oc.env:…} in `previous` that this run's config has too by the value that it has now.

    `values` may lack what is stored: a replay has no loggers.
    """
    resolved: dict[str, Any] = {}
    for key, value in previous.items():
        if key not in values:
            resolved[key] = value
        elif isinstance(value, Mapping) and isinstance(stored.get(key), Mapping):
            resolved[key] = _resolve_environment(value, stored[key], values[key])
        elif isinstance(value, str) and environment.has_reference(value) and stored.get(key) == value:
            resolved[key] = values[key]
        else:
            resolved[key] = value
    return resolved


def _change_messages(spec: RunSpec, previous: Config) -> list[str]:
    """Return a line for each setting of `previous` that the run changes."""
    changed = resume_policy.changed_settings(previous, spec.config)
    written = serialize.flatten_stored(spec.stored)  # values from the environment are shown as they are written
    return [f"changed on resume: {name} {old} -> {written[name]}" for name, (old, _) in sorted(changed.items())]


def _refuse_edited_config(spec: RunSpec, saved: SavedState) -> None:
    """Refuse a config.yaml that was edited: the checkpoint has its config too.

    Raises:
        ConfigError: a frozen setting differs from the checkpoint's.
    """
    current = _frozen_settings(spec)
    former = legacy_window.fill_stored_window(saved.identity.hyperparameters, current["data.window"])
    problems = [
        f"{name} was {former[name]} and cannot become {value}."
        for name, value in current.items()
        if name in former
        and not resume_policy.may_become(name, former[name], value)  # another version may have other settings
    ]
    if problems:
        problems.append(f"Step {saved.progress.step} was saved with the former value; config.yaml was edited since.")
        raise _frozen_error(spec, problems)


def _refuse_changed_environment(spec: RunSpec, saved: SavedState) -> None:
    """Refuse a frozen setting whose environment variable has another value than when the run was started.

    Only the fingerprint of all frozen settings shows this: config.yaml and the checkpoint hold the variable's name.

    Raises:
        ConfigError: names the settings that come from the environment.
    """
    current = _frozen_settings(spec)
    from_environment = [f"{name}={value}" for name, value in current.items() if environment.has_reference(str(value))]
    if not from_environment:
        return
    if any(name not in saved.identity.hyperparameters for name in current):
        return  # another version had other settings, so its fingerprint cannot be compared
    if resume_policy.frozen_fingerprint(spec.config) == saved.identity.fingerprints.get("config"):
        return
    problem = f"An environment variable changed since the run was started: {', '.join(from_environment)} cannot change."
    raise _frozen_error(spec, [problem])


def _frozen_settings(spec: RunSpec) -> dict[str, Any]:
    """Return dotted name to value, as in config.yaml, of the settings that a resume may not change."""
    stored = serialize.flatten_stored(spec.stored)
    return {name: value for name, value in stored.items() if not resume_policy.is_free_on_resume(name)}


def _frozen_error(spec: RunSpec, problems: Sequence[str]) -> ConfigError:
    assert spec.source is not None
    advice = f"For a new run, add the changed settings to: {repeat_command(spec.source.run)}"
    return ConfigError("\n".join([*problems, advice]))
