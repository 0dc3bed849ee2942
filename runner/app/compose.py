"""From one command line to a composed config: the schema, the search path, the stored config, the checks."""

from __future__ import annotations

import copy
import functools
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os.path import abspath
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.app import guard, hydra_internals
from runner.common.errors import ConfigError
from runner.config import schema, serialize
from runner.config.groups import CONF_DIR
from runner.config.invocation import Invocation
from runner.config.schema import Config, DataConfig
from runner.runs import sweep_manifest
from runner.runs.earlier_window import recorded_window
from runner.runs.find import run_or_best_job
from runner.runs.run_spec import ResumeSource, find_resume_source


@dataclass(frozen=True)
class HydraSession:
    """Hydra, opened for one invocation."""

    hydra: hydra_internals.Hydra
    flags: Namespace
    """The flags, parsed by Hydra's parser, and `overrides`."""
    source: ResumeSource | None
    """The run that `resume=` names, with its stored config, which is read once."""

    @property
    def config_name(self) -> str:
        """Name of the primary config."""
        return self.flags.config_name or "config"

    def compose(self) -> DictConfig:
        """Compose the config, with Hydra's node; `is_multirun` tells whether it is that of a sweep.

        Raises:
            ConfigError, HydraException, OmegaConfBaseException: the config is wrong; see `errors.translate_error`.
        """
        return hydra_internals.compose(self.hydra, self.config_name, self.flags.overrides, self.flags.multirun)

    def context(self, composed: DictConfig) -> HydraContext:
        """Return what jobs, sweepers and launchers get of Hydra: its config loader and the typed callbacks."""
        return HydraContext(self.hydra.config_loader, hydra_internals.Callbacks(composed))

    def print_requested(self) -> None:
        """Print what --cfg, --info, --shell-completion or --hydra-help asks for."""
        hydra_internals.print_requested(self.hydra, self.config_name, self.flags)


@contextmanager
def open_session(invocation: Invocation) -> Iterator[HydraSession]:
    """Open Hydra for `invocation`: register the schema and the stored config, and set up the search path.

    Raises:
        ConfigError: a wrong flag, no such --config-dir, or `resume=` or `repeat=` names no run.
    """
    register_schema()
    arguments = invocation.arguments
    source = find_resume_source(invocation.resume) if invocation.resume else None
    if source or invocation.repeat:
        settings = stored_settings(invocation, source)
        ConfigStore.instance().store(group="stored", name="run", package="_global_", node=settings)
        arguments.append("stored=run")
    if "train.iters" in invocation.settings and "train.epochs" not in invocation.settings:
        arguments.append("train.epochs=null")  # else the epochs of a recipe or a stored run would count
    flags = hydra_internals.parse_flags(arguments)
    primary = flags.config_path or str(CONF_DIR)
    path = hydra_internals.search_path(primary if "://" in primary else abspath(primary), flags.config_dir)
    typed = frozenset({*invocation.hydra_settings, *invocation.settings})
    manifest = invocation.sweep and invocation.sweep / sweep_manifest.NAME
    check_config = partial(guard.check_config, typed=typed, recorded_in=manifest)
    loader = hydra_internals.CheckedLoader(path, guard.check_file, check_config)
    with hydra_internals.open_hydra(loader) as hydra:
        yield HydraSession(hydra, flags, source)


@functools.cache
def register_schema() -> None:
    """Make the schema known to Hydra, which checks every config of the defaults list against it."""
    ConfigStore.instance().store(name="schema", node=Config)


def checked_by_schema(settings: Mapping[str, Any]) -> DictConfig:
    """Return a config with these settings, and the defaults of the schema for all others.

    Raises:
        OmegaConfBaseException: a setting is unknown, or its value has another type.
    """
    merged = OmegaConf.merge(_schema(), settings)  # a copy
    assert isinstance(merged, DictConfig)
    return merged


@functools.cache
def _schema() -> DictConfig:
    return OmegaConf.structured(Config)  # 20 ms


def is_multirun(composed: DictConfig) -> bool:
    """Return whether the `composed` config is that of a sweep: -m was typed, or a file sets hydra.mode."""
    return composed.hydra.mode == RunMode.MULTIRUN


def stored_settings(invocation: Invocation, source: ResumeSource | None) -> dict[str, Any]:
    """Return the stored config of the run that `resume=` or `repeat=` names, without what the invocation replaces.

    Raises:
        ConfigError: both are given, or the stored config cannot be read.
    """
    if invocation.resume and invocation.repeat:
        raise ConfigError("resume= and repeat= exclude each other: continue a run, or start a new one like it.")
    if source is None:
        assert invocation.repeat is not None
        source = ResumeSource(run_or_best_job(invocation.repeat))
    settings = serialize.to_dict(serialize.from_dict(source.config, str(source.run / "config.yaml")))
    # A branch drops the adapter that its source started from, since its checkpoint holds the weights, but for methods
    # whose reference it is. A run that resumes in place keeps it: without a checkpoint it starts from it again.
    in_branch = ["adapter"] if source.branch and settings["method"]["name"] == "sft" else []
    dropped = schema.provenance_settings() if invocation.repeat else in_branch
    for name in (*invocation.group_choices, *dropped):
        settings.pop(name, None)
    # Earlier versions stored null and left the window to the backend. A new run takes what it was, or else the default.
    if invocation.repeat and settings.get("data", {}).get("window", 0) is None:
        settings["data"]["window"] = recorded_window(source.run) or DataConfig.window
    remove_alternatives(settings, invocation.settings)
    return settings


def remove_alternatives(settings: dict[str, Any], typed: Collection[str]) -> None:
    """Set the stored one of lora.scale and lora.alpha to null where the other is `typed`: they exclude each other."""
    for name, alternative in (("scale", "alpha"), ("alpha", "scale")):
        if f"lora.{name}" in typed and f"lora.{alternative}" not in typed and "lora" in settings:
            settings["lora"][alternative] = None


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a copy of the `composed` config without Hydra's node."""
    copied = copy.deepcopy(composed)
    with read_write(copied), open_dict(copied):
        del copied["hydra"]
    return copied


def set_hydra(composed: DictConfig, name: str, value: Any) -> None:
    """Set `name` below the hydra node of the `composed` config, which Hydra closed for changes."""
    with read_write(composed.hydra), open_dict(composed.hydra):
        OmegaConf.update(composed.hydra, name, value)
