"""Which checkpoint a run goes on from, and whether it may: verified, of this run, with settings that still fit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints import mirror, verify
from runner.checkpoints.store import CheckpointStore
from runner.checkpoints.verify import LoadedCheckpoint
from runner.common.atomic_io import repair_replaced_folder
from runner.common.errors import CheckpointError, ConfigError
from runner.common.filesystem import FileSystem
from runner.config import resume_policy, schema, validation
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import RunSpec
from runner.training import state_files
from runner.training.state_files import SavedState


@dataclass
class ResumePoint:
    """The checkpoint that a run goes on from."""

    loaded: LoadedCheckpoint
    restored: SavedState
    said: list[str]
    changed: bool
    """Whether settings differ from the stored ones."""


def is_done(start: RunSpec, found: ResumePoint | None) -> bool:
    """Whether a finished run was resumed as it is: there is nothing to load a model for."""
    if found is None or found.changed or start.source is None or start.source.branch:
        return False
    return bool(start.directory.read_status().get("ended") and start.directory.read_status()["state"] == "finished")


def find_resume_point(start: RunSpec) -> ResumePoint | None:
    """The verified checkpoint to go on from, None for a fresh start; changed settings are judged here.

    Raises:
        CheckpointError: there were checkpoints and none is valid, or the one that was named is damaged.
        ConfigError: a frozen setting was changed, on the line or in config.yaml.
    """
    if start.source is None:
        return None
    _judge_changes(start, 0)  # first, since where the checkpoints lie is a setting too
    said: list[str] = []
    if start.source.checkpoint is not None:
        loaded = verify.load_checkpoint(start.source.checkpoint, FileSystem())
        restored = state_files.read_state(loaded)
    else:
        start.run_id, loaded_, said = _newest(start)
        if loaded_ is None:
            return None
        loaded, restored = loaded_, state_files.read_state(loaded_)
    changes = _judge_changes(start, restored.progress.step)
    _judge_edits(start, restored)
    return ResumePoint(loaded, restored, [*said, *changes], changed=bool(changes))


def _newest(start: RunSpec) -> tuple[str, LoadedCheckpoint | None, list[str]]:
    directory = start.directory
    status = directory.read_status()
    run_id = status.get("run_id")
    if not isinstance(run_id, str):  # status.json is lost: the checkpoints know whose they are
        kept = CheckpointStore(directory.checkpoints, "").checkpoints()
        if len({c.run_id for c in kept}) > 1:
            raise CheckpointError(
                f"{directory.status} is lost, and the checkpoints are of several runs: "
                + ", ".join(f"{c.path.name} of {c.run_id}" for c in kept)
                + f". Name the one to go on from: resume={shlex.quote(str(kept[-1].path))}"
            )
        run_id = kept[-1].run_id if kept else start.run_id
    store = CheckpointStore(directory.checkpoints, run_id)
    repair_replaced_folder(directory.result, FileSystem())
    said = store.repair()
    loaded, wrong = store.newest_valid(check=state_files.read_state)  # type: ignore[arg-type]
    if loaded is None and (wrong or status.get("last_checkpoint")):
        wrong = wrong or [f"{directory.checkpoints}: step {status['last_checkpoint']} was saved and is gone"]
        raise CheckpointError(
            "\n".join(
                [
                    *wrong,
                    f"No checkpoint of {directory.path} is valid, and a run never starts over in silence.",
                ]
            )
            + _backup_of(start, run_id)
            + f"\nTo train anew with its settings: python -m runner repeat={shlex.quote(str(directory.path))}"
        )
    if loaded is not None:
        said += [f"damaged, not used: {line}" for line in wrong]
    return run_id, loaded, said


def _backup_of(start: RunSpec, run_id: str) -> str:
    root = start.config.checkpoint.backup
    found = mirror.find_backup(Path(root).expanduser(), run_id) if root else None
    return f"\nIts backup may go on: python -m runner resume={shlex.quote(str(found))}" if found else ""


def _judge_changes(start: RunSpec, step: int) -> list[str]:
    assert start.source is not None
    where = start.source.run / "config.yaml"
    raw = RunDirectory(start.source.run).read_config()
    stored = schema.from_dict(_resolved(raw, start.stored, schema.to_dict(start.config)), str(where))
    changed = resume_policy.changes_on_resume(validation.fill_defaults(stored), start.config, step)
    now = _named(start.stored)  # what comes from the environment is named, not shown
    return [f"changed on resume: {name} {old} -> {now[name]}" for name, (old, _) in sorted(changed.items())]


def _resolved(raw: Mapping[str, Any], now: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`raw`, stored settings, with the value that it has now in place of each ${oc.env:…} that stands in both."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        same = isinstance(value, str) and "${oc.env:" in value and now.get(key) == value
        inside = isinstance(value, Mapping) and isinstance(now.get(key), Mapping)
        found[key] = _resolved(value, now[key], values[key]) if inside else values[key] if same else value
    return found


def _judge_edits(start: RunSpec, restored: SavedState) -> None:
    """Refuse a config.yaml that was edited or an environment that changed: the checkpoint knows its settings too."""
    then, now = restored.identity.hyperparameters, _named(start.stored)
    frozen = [name for name in now if not resume_policy.is_free_on_resume(name)]
    known = [name for name in frozen if name in then]  # another version may have other settings
    problems = [f"{name} was {then[name]} and cannot become {now[name]}." for name in known if then[name] != now[name]]
    if problems:
        problems.append(f"So it was when step {restored.progress.step} was saved; config.yaml was changed since.")
    taken = [f"{name}={now[name]}" for name in known if "${oc.env:" in str(now[name])]
    same = resume_policy.frozen_fingerprint(start.config) == restored.identity.fingerprints.get("config")
    if taken and known == frozen and not problems and not same:
        problems.append(f"The environment is another than when the run was started: {', '.join(taken)} cannot change.")
    if problems:
        raise ConfigError("\n".join([*problems, "A new run with changed settings: repeat=RUN."]))


def _named(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name to value as config.yaml holds it; the options of the loggers are one value."""
    flat = schema.flatten_dict({key: value for key, value in stored.items() if key != "loggers"})
    return flat | {"loggers": stored.get("loggers", {})}
