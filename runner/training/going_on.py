"""Which checkpoint a run goes on from, and whether it may: verified, of this run, with settings that still fit."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from runner import changes, checks, config
from runner.checkpoints import backup, folders, verify
from runner.checkpoints.disk import Disk
from runner.checkpoints.store import Store
from runner.checkpoints.verify import Loaded
from runner.errors import CheckpointError
from runner.rundir import RunDirectory
from runner.start import Start
from runner.training import state
from runner.training.state import Restored


@dataclass
class Found:
    """The checkpoint that a run goes on from."""

    loaded: Loaded
    restored: Restored
    said: list[str]
    changed: bool
    """Whether settings differ from the stored ones."""


def is_done(start: Start, found: Found | None) -> bool:
    """Whether a finished run was resumed as it is: there is nothing to load a model for."""
    if found is None or found.changed or start.source is None or start.source.branch:
        return False
    return bool(start.directory.read_status().get("ended") and start.directory.read_status()["state"] == "finished")


def find_checkpoint(start: Start) -> Found | None:
    """The verified checkpoint to go on from, None for a fresh start; changed settings are judged here.

    Raises:
        CheckpointError: there were checkpoints and none is valid, or the one that was named is damaged.
        ConfigError: a frozen setting was changed.
    """
    if start.source is None:
        return None
    said: list[str] = []
    if start.source.checkpoint is not None:
        loaded = verify.load(start.source.checkpoint, Disk())
        restored = state.read(loaded)
    else:
        start.run_id, loaded_, said = _newest(start)
        if loaded_ is None:
            _judge_changes(start, 0)
            return None
        loaded, restored = loaded_, state.read(loaded_)
    changes = _judge_changes(start, restored.progress.step)
    return Found(loaded, restored, [*said, *changes], changed=bool(changes))


def _newest(start: Start) -> tuple[str, Loaded | None, list[str]]:
    directory = start.directory
    status = directory.read_status()
    run_id = status.get("run_id")
    if not isinstance(run_id, str):  # status.json is lost: the checkpoints know whose they are
        kept = Store(directory.checkpoints, "").checkpoints()
        run_id = kept[-1].run_id if kept else start.run_id
    store = Store(directory.checkpoints, run_id)
    folders.repair(directory.result, Disk())
    said = store.repair()
    loaded, wrong = store.newest_valid(check=state.read)  # type: ignore[arg-type]
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


def _backup_of(start: Start, run_id: str) -> str:
    root = start.config.checkpoint.backup
    found = backup.find_for(Path(root).expanduser(), run_id) if root else None
    return f"\nIts backup may go on: python -m runner resume={shlex.quote(str(found))}" if found else ""


def _judge_changes(start: Start, step: int) -> list[str]:
    assert start.source is not None
    where = start.source.run / "config.yaml"
    stored = config.from_dict(RunDirectory(start.source.run).read_config(), str(where))
    changed = changes.changes_on_resume(checks.complete(stored), start.config, step)
    return [f"changed on resume: {name} {old} -> {new}" for name, (old, new) in sorted(changed.items())]
