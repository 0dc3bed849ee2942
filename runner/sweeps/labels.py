"""The labels of a sweep: what all its jobs share is the sweep's, and a job has what it is called beside that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.types import Override

from runner.common.errors import ConfigError
from runner.config.labels import NO_LABELS, SETTINGS, Labels, problems
from runner.runs.labels import edit_labels, read_labels, write_labels
from runner.runs.sweep_manifest import SweepJob, has_sweep_manifest


def share_labels(folder: Path, jobs: Sequence[SweepJob]) -> list[SweepJob]:
    """Give the labels that the first jobs of a sweep share to the sweep, and return the jobs with the others alone.

    Of jobs that are added later only the tags count: the sweep may have another name by then.
    """
    if not has_sweep_manifest(folder):
        shared = Labels.shared(job.labels for job in jobs)
        if shared != NO_LABELS:
            write_labels(folder, shared)
        return [replace(job, labels=job.labels.without(shared)) for job in jobs]
    sweep = read_labels(folder)
    return [replace(job, labels=Labels(tags=job.labels.without(sweep).tags)) for job in jobs]


def relabel(folder: Path, typed: Sequence[Override]) -> list[Override]:
    """Give the sweep those of the `typed` overrides that are labels, and return the others.

    Raises:
        ConfigError: a label is invalid.
    """
    changes = {override.key_or_group: override.value() for override in typed if override.key_or_group in SETTINGS}
    if changes:
        for problem in problems(changes.get("name"), changes.get("tags") or (), changes.get("note")):
            raise ConfigError(problem)
        edit_labels(folder, lambda present: Labels.of({**present.to_dict(), **changes}))
    return [override for override in typed if override.key_or_group not in SETTINGS]
