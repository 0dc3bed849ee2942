"""The labels of a sweep: what all its jobs share is the sweep's, and a job has what it is called beside that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def take_labels(typed: Sequence[Override]) -> tuple[dict[str, Any], list[Override]]:
    """Return the labels among the `typed` overrides, by setting, and the other overrides.

    Raises:
        ConfigError: a label is invalid.
    """
    changes = {override.key_or_group: override.value() for override in typed if override.key_or_group in SETTINGS}
    for problem in problems(changes.get("name"), changes.get("tags") or (), changes.get("note")):
        raise ConfigError(problem)
    return changes, [override for override in typed if override.key_or_group not in SETTINGS]


def relabel(folder: Path, changes: Mapping[str, Any]) -> None:
    """Give the sweep the labels that `take_labels` returned. Raises ConfigError where its present ones are damaged."""
    if changes:
        edit_labels(folder, lambda present: Labels.of({**present.to_dict(), **changes}))
