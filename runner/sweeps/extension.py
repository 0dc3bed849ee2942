"""What overrides mean that are typed when a sweep is resumed.

One rule: a frozen setting, and one that the sweep varies, spans the grid: its values are added to those of the sweep.
Any other setting is free on resume: it has one value and applies to all jobs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override

from runner.common.errors import ConfigError
from runner.config import resume_policy, serialize
from runner.config.schema import GROUPS
from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import SweepJob, SweepManifest
from runner.sweeps import grid
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.job_planner import JobPlanner
from runner.sweeps.params import with_params
from runner.sweeps.plan import has_begun


@dataclass(frozen=True)
class Extension:
    """What the overrides typed on resume add to a sweep."""

    changes: dict[str, Any]
    """Free settings and their values, as stored: they apply to all jobs."""
    jobs: list[SweepJob]
    """New jobs."""


def extend(manifest: SweepManifest, typed: Sequence[Override], composer: JobComposer, planner: JobPlanner) -> Extension:
    """Return what the `typed` overrides add to the sweep of `manifest`.

    Raises:
        ConfigError: an override is invalid, or several values of a free setting.
    """
    _refuse_unused_vars(manifest, typed)
    spanning = [override for override in typed if _spans_grid(override, manifest, composer)]
    free = [override for override in typed if override not in spanning]
    changes = _changes(manifest, free, planner)
    jobs = [job.with_changes(changes) for job in manifest.jobs]
    if not spanning:
        return Extension(changes, [])
    rows = _rows(jobs, spanning)
    combinations = itertools.product(rows.items(), grid.expand_grid(spanning))
    if any(override.key_or_group == "experiment" for override in spanning):
        if any(argument.startswith("repeat=") for argument in manifest.arguments):
            raise ConfigError("experiment= cannot be added to a sweep that repeats a run: start a new sweep.")
        keys = {override.key_or_group for override in spanning}
        planned = []
        for (others, _), values in combinations:
            own = composer.compose((*others, *values)).params  # of a recipe that is a sweep itself
            planned += with_params((*others, *values), own, keys, composer)
        return Extension(changes, planner.plan(planned, changes={**manifest.jobs[0].changes, **changes}))
    return Extension(changes, planner.plan_changed((job, others, values) for (others, job), values in combinations))


def _refuse_unused_vars(manifest: SweepManifest, typed: Sequence[Override]) -> None:
    """Refuse a typed value below vars that a job has no recorded reference to: the job would be the same."""
    for name in (override.key_or_group for override in typed):
        pattern = re.compile(rf"{re.escape(name)}(?![\w.])")
        if name.startswith("vars.") and not all(pattern.search(str(job.references)) for job in manifest.jobs):
            raise ConfigError(f"{name}: no setting of all jobs is recorded to follow it: type the settings themselves.")


def _spans_grid(override: Override, manifest: SweepManifest, composer: JobComposer) -> bool:
    key = override.key_or_group
    if composer.is_group(override):
        return key != "loggers"
    if key.startswith("vars."):
        return True
    if key in GROUPS:
        return True  # a dict of a section's settings
    typed = {o for job in manifest.jobs for o in job.overrides if grid.override_key(o) == key}
    return len(typed) > 1 or not resume_policy.is_free_on_resume(key)


def _changes(manifest: SweepManifest, free: Sequence[Override], planner: JobPlanner) -> dict[str, Any]:
    """Return the values of free settings that differ from those of a job, as they are stored."""
    for override in free:
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line}: {override.key_or_group} may change on resume, so it applies to all jobs: "
                "give one value. A new sweep can vary it."
            )
    if not free:
        return {}
    first = manifest.jobs[0]
    assert first.config is not None
    changed = serialize.flatten_stored(planner.changed_config(first, [o.input_line or "" for o in free]))
    before = serialize.flatten_stored(first.config)
    keys = [override.key_or_group for override in free]
    values = [{**serialize.flatten_stored(job.config or {}), **job.own_changes} for job in manifest.jobs]
    changes = {
        name: value
        for name, value in changed.items()
        if (before.get(name) != value or resume_policy.is_set_by(name, keys))
        and any(name not in settings or settings[name] != value for settings in values)
    }
    for job in manifest.jobs:
        _require_allowed(manifest, job, changes)
    return changes


def _require_allowed(manifest: SweepManifest, job: SweepJob, changes: dict[str, Any]) -> None:
    """Refuse changes that the run of a job that has begun would refuse."""
    directory = RunDirectory(manifest.folder / job.folder)
    if not changes or not has_begun(directory.path):
        return
    where, stored = str(directory.config), directory.read_config()
    after = serialize.from_dict(serialize.change_dict(stored, changes), where)
    step = directory.read_status().get("step") or 0
    resume_policy.refuse_frozen_changes(serialize.from_dict(stored, where), after, directory.path, step)


def _rows(jobs: Sequence[SweepJob], spanning: Sequence[Override]) -> dict[tuple[str, ...], SweepJob]:
    """Return the different sets of overrides without those that `spanning` sets, each with the first such job."""
    typed = {grid.override_identity(text) for override in spanning for (text,) in grid.expand_grid([override])}
    rows: dict[tuple[str, ...], SweepJob] = {}
    for job in jobs:
        rows.setdefault(tuple(o for o in job.overrides if grid.override_identity(o) not in typed), job)
    return rows
