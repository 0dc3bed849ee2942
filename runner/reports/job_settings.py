"""The settings by which the jobs of a sweep are told apart: columns of its tables, and labels of its jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runner.config import serialize
from runner.config.quoting import unescape, unquote
from runner.reports import settings_text
from runner.runs.inspect import RunInfo
from runner.runs.sweep_manifest import SweepJob


def varied_settings(jobs: Sequence[SweepJob], runs: Mapping[int, RunInfo] | None = None) -> dict[int, dict[str, Any]]:
    """Return, by job number, the value of each setting and group that was typed and that differs between the jobs.

    The values are those that the job runs with, also where another job alone was typed with one: from the config of its
    run in `runs`, by job number, where it has begun, else from its record. A dict of a section's settings counts as
    those of them that differ.
    """
    recorded = {job.number: serialize.flatten_dict(job.config or {}) for job in jobs}
    for number, run in (runs or {}).items():
        recorded[number].update({name: run.settings[name] for name in recorded[number] if name in run.settings})
    values: dict[str, list[Any]] = {}
    changed = [name for job in jobs for name in job.later_changes]  # which a finished job may not have got
    dicts = {override.lstrip("+").partition("={")[0] for job in jobs for override in job.overrides if "={" in override}
    for name in dict.fromkeys([*_varied_overrides(jobs), *changed]):
        leaves = [leaf for settings in recorded.values() for leaf in settings if leaf.startswith(f"{name}.")]
        is_choice = any(name in job.choices for job in jobs) and name not in dicts
        for leaf in (name,) if is_choice or not leaves else dict.fromkeys([*leaves, name]):
            values[leaf] = [_value(leaf, job, recorded[job.number]) for job in jobs]
    differing = {name: found for name, found in values.items() if any(value != found[0] for value in found)}
    return {job.number: {name: found[i] for name, found in differing.items()} for i, job in enumerate(jobs)}


def job_labels(jobs: Sequence[SweepJob]) -> dict[int, str]:
    """Return, by job number, what tells each job of a sweep from the others, as ``lora.rank=8 seed=1``."""
    varied = varied_settings(jobs)
    names = next(iter(varied.values()), {})
    texts = {name: settings_text.texts_of(name, [settings[name] for settings in varied.values()]) for name in names}
    return {
        number: " ".join(f"{name}={texts[name][i]}" for name in names if settings[name] is not None)
        for i, (number, settings) in enumerate(varied.items())
    }


def _varied_overrides(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the keys of the overrides that not all jobs share, in the order in which they appear."""
    overrides = [{override.lstrip("+") for override in job.overrides} for job in jobs]
    shared = set.intersection(*overrides) if overrides else set()
    texts = [override.lstrip("+") for job in jobs for override in job.overrides]
    return list(dict.fromkeys(text.partition("=")[0] for text in texts if text not in shared))


def _value(name: str, job: SweepJob, settings: Mapping[str, Any]) -> Any:
    if name in settings:
        return settings[name]
    if name in job.choices:
        return job.choices[name]
    if job.config is not None:
        return None
    typed = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in job.overrides)}
    return unescape(unquote(typed[name])) if name in typed else None
