"""Settings that `resume=SWEEP/3 key=value` changes for one job: its sweep keeps them for this job."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.app import guard
from runner.common.errors import ConfigError, DirectoryInUse
from runner.config import resume_policy, schema, serialize
from runner.runs import sweep_manifest
from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import SweepJob


@contextmanager
def job_changes_recorded(run: Path, after: Mapping[str, Any], typed: Collection[str]) -> Iterator[None]:
    """Record in the sweep of a resumed `run`, if it is a job of one, what was typed for it alone, once the block has
    ended without an error.

    Otherwise the next resume of the sweep would give the job again what was typed for all jobs before.

    Args:
        run: the directory of the run.
        after: the config with which it resumes, as stored.
        typed: keys of the overrides that were typed.

    Raises:
        DirectoryInUse: the sweep is running, so nothing can be recorded.
    """
    sweep = RunDirectory(run.parent)
    changes = _changes(run, after, typed) if typed and find_job(run) is not None else {}
    if not changes:
        yield
        return
    try:
        sweep.lock()
    except DirectoryInUse as error:
        raise DirectoryInUse(f"{error} The settings of one of its jobs can be changed after that.") from None
    try:
        yield
        if (job := find_job(run)) is not None:
            sweep_manifest.read_manifest(sweep.path).record(own_changes={job.number: changes})
    finally:
        sweep.unlock()


def _changes(run: Path, after: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    directory = RunDirectory(run)
    before, step = directory.read_config(), directory.read_status().get("step") or 0
    return own_changes(serialize.flatten_stored(before), serialize.flatten_stored(after), typed, step)


def own_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], typed: Collection[str], step: int
) -> dict[str, Any]:
    """Return the settings that are typed for a job alone, by dotted name; none where its run will refuse them.

    A typed value that the run has already counts too: the sweep may have set another for all jobs, which this job did
    not get yet.
    """
    named = {name: value for name, value in after.items() if resume_policy.is_set_by(name, typed)}
    changed = {name for name, value in named.items() if before.get(name) != value}
    if any(not resume_policy.is_free_on_resume(name) for name in changed):
        return {}
    if "train.iters" in changed and (not resume_policy.iters_may_change(before) or after["train.iters"] < step):
        return {}
    left_out = {
        guard.TRUST,
        *schema.provenance_settings(),
        *schema.label_settings(),
    }  # trust is given for one invocation
    return {
        name: value for name, value in named.items() if resume_policy.is_free_on_resume(name) and name not in left_out
    }


def find_job(run: Path) -> SweepJob | None:
    """Return the job that `run` is; None where it is none, or its sweep's manifest is damaged."""
    try:
        return sweep_manifest.read_manifest(run.parent).job_in(run.name)
    except ConfigError:
        return None
