"""Plans the jobs of a sweep: each is composed, validated and gets its folder before the first starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runner.app.resolve import config_to_store, resolve_to_start
from runner.common.errors import ConfigError, RunnerError
from runner.common.text import shorten
from runner.config import environment, schema, serialize
from runner.config.labels import SETTINGS as LABEL_SETTINGS
from runner.config.labels import Labels
from runner.config.setting import PathKind, absolute_path
from runner.data.source import HUB_ID, find_dataset, find_sources
from runner.runs.sweep_manifest import SweepJob, SweepManifest, is_valid_folder, unusable_reason
from runner.sweeps.hydra_node import set_folder, with_hydra_node
from runner.sweeps.job_composer import ComposedJob, JobComposer

_NUMBERED = "${hydra.job.num}"
"""Hydra's default of hydra.sweep.subdir."""


class JobPlanner:
    """Plans new jobs of one sweep; jobs whose config is planned or recorded already are left out."""

    def __init__(
        self, composer: JobComposer, manifest: SweepManifest, sweep_config: DictConfig, stop_at: int | None
    ) -> None:
        self._composer = composer
        self._manifest = manifest
        self._sweep_config = sweep_config
        self._stop_at = stop_at
        self._folder_template = OmegaConf.to_container(sweep_config.hydra.sweep, resolve=False)["subdir"]  # type: ignore
        self._configs = {config_key(job.config): job for job in manifest.jobs if job.config is not None}
        self._folders = {job.folder for job in manifest.jobs}
        self._existing_inputs: set[str] = set()
        self._unusable_names: list[str] = []
        self._count = len(manifest.jobs)

    def plan(
        self,
        overrides_of_jobs: Iterable[Sequence[str]],
        *,
        changes: Mapping[str, Any] | None = None,
        again: bool = False,
    ) -> list[SweepJob]:
        """Return the jobs with these overrides that are new.

        Args:
            overrides_of_jobs: those of each job.
            changes: settings that were changed for all jobs of the sweep since it started.
            again: whether jobs with the config of another job are returned too.

        Raises:
            ConfigError: no job can run with one of them; names the job.
        """
        planned = []
        for overrides in overrides_of_jobs:
            composed = self._composer.compose(overrides)
            job, is_new = self._plan(overrides, composed, changes or {}, again=again)
            planned += [job] if is_new else []
        self._print_unusable_names()
        return planned

    def plan_changed(self, jobs: Iterable[tuple[SweepJob, Sequence[str], Sequence[str]]]) -> list[SweepJob]:
        """Return the new jobs that take the recorded config of a job, with overrides on top.

        Args:
            jobs: for each, a recorded job, those of its overrides that are kept, and the overrides on top.

        Raises:
            ConfigError: no job can run with one of them; names the job.
        """
        planned = []
        for job, kept, typed in jobs:
            found, is_new = self.find_or_plan(job, kept, typed)
            planned += [found] if is_new else []
        self._print_unusable_names()
        return planned

    def find_or_plan(self, job: SweepJob, kept: Sequence[str], typed: Sequence[str]) -> tuple[SweepJob, bool]:
        """Return the job that takes the config of a job, with the overrides `typed` on top, and whether it is new.

        Args:
            job: a recorded job, or a draft.
            kept: those of its overrides that the new one is recorded with; its config has all of them, but that a
                group which is typed replaces its section, with the overrides of `job` below it on top.
            typed: the overrides on top.

        Raises:
            ConfigError: no run can have this config; names the overrides.
        """
        assert job.config is not None
        stored = serialize.change_dict(job.config, job.references)
        config = self._composer.change(stored, job.overrides, typed)
        choices = dict(job.choices)
        choices.update({self._composer.parse(o).key_or_group: o.partition("=")[2] for o in typed if self._is_group(o)})
        return self._plan([*kept, *typed], ComposedJob(config, choices, {}), {})

    def find_or_compose(self, overrides: Sequence[str], changes: Mapping[str, Any]) -> tuple[SweepJob, bool]:
        """Return the job that is composed with these overrides, and whether it is new.

        Args:
            overrides: all of its overrides.
            changes: settings that were changed for all jobs of the sweep since it started.

        Raises:
            ConfigError: no run can have this config; names the overrides.
        """
        return self._plan(overrides, self._composer.compose(overrides), changes)

    def draft(self, overrides: Sequence[str]) -> SweepJob:
        """Return a job with these overrides that is not planned: others derive from it.

        Raises:
            ConfigError: no run can have this config; names the overrides.
        """
        composed = self._composer.compose(overrides)
        config = self._resolve(overrides, composed, self._count, str(self._count))
        labels, references = Labels.take(config), references_of(composed.config)
        return SweepJob(
            self._count, str(self._count), _recorded(overrides), config, composed.choices, references, labels=labels
        )

    def changed_config(self, job: SweepJob, typed: Sequence[str]) -> dict[str, Any]:
        """Return the config of a recorded job with overrides on top, as it is stored."""
        assert job.config is not None
        composed = ComposedJob(self._composer.change(job.config, job.overrides, typed), dict(job.choices), {})
        config = self._resolve(typed, composed, job.number, job.folder, needs_adapter=False)
        Labels.take(config)
        return config

    def complete(self, job: SweepJob) -> SweepJob:
        """Return a job of an earlier version, which has not begun, with the config that its overrides give today."""
        composed = self._composer.compose(job.overrides)
        config = self._resolve(job.overrides, composed, job.number, job.folder)
        return replace(job, labels=Labels.take(config), config=config, choices=composed.choices)

    def _is_group(self, override: str) -> bool:
        return self._composer.is_group(self._composer.parse(override))

    def _plan(
        self, overrides: Sequence[str], composed: ComposedJob, changes: Mapping[str, Any], *, again: bool = False
    ) -> tuple[SweepJob, bool]:
        """Return the job with this config, and whether it is new; `again`: it is new also where another has it."""
        number = self._count
        folder, unusable = self._folder(overrides, composed, number)
        config = serialize.change_dict(self._resolve(overrides, composed, number, folder), changes)
        labels = Labels.take(config)
        if (key := config_key(config)) in self._configs and not again:
            return self._configs[key], False
        self._folders.add(folder)
        if unusable is not None:
            self._unusable_names.append(f"job {number}: '{shorten(unusable)}', {unusable_reason(unusable)}")
        self._count += 1
        references = references_of(composed.config)
        job = SweepJob(number, folder, _recorded(overrides), config, composed.choices, references, labels=labels)
        self._configs.setdefault(key, job)
        return job, True

    def _resolve(
        self, overrides: Sequence[str], composed: ComposedJob, number: int, folder: str, *, needs_adapter: bool = True
    ) -> dict[str, Any]:
        """Return the config as it is stored, with the values that ${hydra:…} has in this job."""
        try:
            if "${hydra:" in str(OmegaConf.to_container(composed.config, resolve=False)):
                set_folder(self._with_hydra(overrides, composed, number), self._manifest.folder, folder)
            config = resolve_to_start(composed.config, self._stop_at, needs_adapter=needs_adapter)
        except RunnerError as error:
            raise type(error)(f"job {' '.join(overrides)}: {error}") from error
        config.experiment = config.experiment or composed.choices.get("experiment")
        stored = config_to_store(composed.config, config)
        if needs_adapter or any(override.startswith(("data", "model")) for override in overrides):
            try:
                self._require_inputs(config)
            except RunnerError as error:
                reason = environment.redacted(str(error), serialize.to_dict(config), stored)
                raise type(error)(f"job {' '.join(overrides)}: {reason}") from None
        del stored["model"]["trust_remote_code"]  # is given for one invocation
        return stored

    def _require_inputs(self, config: schema.Config) -> None:
        """Refuse local data and models that do not exist; those on the hub are known when they are fetched.

        Raises:
            DataError, ConfigError: names what is missing.
        """
        key = repr((config.data, config.model))
        if key in self._existing_inputs:
            return
        for source in find_sources(config.data):
            if not HUB_ID.fullmatch(source.path):
                find_dataset(source.path)
        model = config.model.path
        if (model.startswith(("/", ".", "~")) or model.endswith(".gguf")) and not os.path.exists(
            absolute_path(model, PathKind.INPUT)
        ):
            raise ConfigError(f"model.path={model}: there is no such file or folder.")
        self._existing_inputs.add(key)

    def _print_unusable_names(self) -> None:
        """Print in one line which jobs have their number as their folder instead of hydra.sweep.subdir."""
        if names := self._unusable_names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            print(f"named by number, as hydra.sweep.subdir gives no usable folder: {names[0]}{more}")
            self._unusable_names = []

    def _folder(self, overrides: Sequence[str], composed: ComposedJob, number: int) -> tuple[str, str | None]:
        """Return the name of the job's folder, and the one from hydra.sweep.subdir where that cannot be used.

        It is hydra.sweep.subdir, or else the job's number.
        """
        names = [str(number), f"job-{number}"]
        if self._folder_template != _NUMBERED:
            job_config = self._with_hydra(overrides, composed, number)
            HydraConfig.instance().set_config(job_config)  # for ${hydra:…}
            names.insert(0, str(OmegaConf.select(job_config, "hydra.sweep.subdir")))
        folder = next(name for name in names if is_valid_folder(name) and name not in self._folders)
        return folder, names[0] if folder != names[0] and len(names) > 2 else None

    def _with_hydra(self, overrides: Sequence[str], composed: ComposedJob, number: int) -> DictConfig:
        return with_hydra_node(
            composed.config, self._sweep_config, number=number, overrides=overrides, choices=composed.choices
        )


def _recorded(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return those of a job's overrides that the manifest records."""
    return tuple(o for o in overrides if not o.lstrip("+").startswith(("stored=", "hydra.", "hydra/")))


def references_of(composed: DictConfig) -> dict[str, Any]:
    """Return the settings of a composed config that refer to others, as written; those to the environment are stored so
    in the config itself."""
    written = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(written, dict)
    flat = serialize.flatten_dict({str(name): value for name, value in written.items()})
    return {
        name: value
        for name, value in flat.items()
        if name not in LABEL_SETTINGS and "${" in environment.REFERENCE.sub("", str(value))
    }


def config_key(config: Mapping[str, Any]) -> str:
    """Return a text that is equal for equal configs; settings that only record a provenance do not count."""
    flat = serialize.flatten_stored(config)
    return json.dumps({name: value for name, value in flat.items() if name not in schema.provenance_settings()})
