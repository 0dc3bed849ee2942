"""Checks on configs that someone else may have written: a recipe from --config-dir, a stored run or sweep.

Hydra calls whatever a `_target_` names, configures logging by class names and sets environment variables before the
first line of a run. Such settings are accepted when typed on the command line and refused when they come from a file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import DictConfig, OmegaConf

from runner.common import safe_yaml
from runner.common.errors import ConfigError
from runner.common.text import shorten
from runner.config import environment
from runner.config.groups import CONF_DIR
from runner.config.search_settings import SearchSettings
from runner.runs.sweep_manifest import SweepManifest

TRUST = "model.trust_remote_code"
_SETTABLE_OF_LAUNCHERS = (
    *("jobs", "n_jobs", "fail_fast", "cpus", "gpus", "mem_gb"),
    *("cluster", "partition", "account", "timeout_min", "signal_delay_s"),
)
_SETTABLE_OF_PLUGINS = {
    "launcher": _SETTABLE_OF_LAUNCHERS,
    "sweeper": ("params", *(field.name for field in dataclasses.fields(SearchSettings))),
}
"""Settings of Hydra's launcher and sweeper that a file may set."""
_MAX_REFERENCES = 20
"""References (${…}) in a config. Each can multiply the text before it, so that a few dozen fill any memory."""
_MAX_CHARACTERS = 100_000
_SUBFOLDER = re.compile(r"\.?\w[\w.-]*")


def check_file(file: Path) -> None:
    """Refuse a config file whose YAML would take unbounded time or memory; the files of `conf/` are not checked.

    Raises:
        ConfigError: names the file and the reason.
    """
    if CONF_DIR in file.parents:
        return
    try:
        safe_yaml.require_bounded(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from None


def check_config(composed: DictConfig, typed: Collection[str], recorded_in: Path | None = None) -> None:
    """Refuse a composed config in which a file would run code, or write outside the directories that were typed.

    Args:
        composed: the config with Hydra's node.
        typed: names of the settings that were typed on the command line.
        recorded_in: the manifest of the sweep whose arguments are composed again, if one is resumed.

    Raises:
        ConfigError: names the setting and what to do.
    """
    settings = OmegaConf.to_container(composed, resolve=False, enum_to_str=True)
    assert isinstance(settings, dict)
    hydra = settings.pop("hydra")
    # A typed group such as hydra/job_logging counts for its settings, unless --config-dir may have replaced its file.
    has_config_dir = any(source["provider"] == "command-line" for source in hydra["runtime"]["config_sources"])
    subfolder = hydra.get("output_subdir")
    if subfolder is not None and not _SUBFOLDER.fullmatch(subfolder):
        raise ConfigError(
            f"hydra.output_subdir={shorten(subfolder)} is invalid: must be the name of a folder in the run's "
            "directory, such as .hydra, or null."
        )
    typed_prefixes = {name if has_config_dir else name.replace("/", ".") for name in typed}
    for name in _risky_settings(hydra):
        if not any(_is_within(name, prefix) or _is_within(prefix, name) for prefix in typed_prefixes):
            source = "a file" if recorded_in is None else str(recorded_in)
            again = "instead" if recorded_in is None else "again"
            raise ConfigError(
                f"{shorten(name)} comes from {source}, not from the command line, and could run code or write "
                f"anywhere. If you wrote that file yourself, type the setting {again}."
            )
    check_references([settings, hydra["run"], hydra["sweep"], hydra["job"]])
    if settings.get("model", {}).get("trust_remote_code") is True and not {"model", TRUST} & set(typed):
        raise ConfigError(
            f"{TRUST}=true comes from a file: code that came with the model would run. If you have read that code and "
            f"trust it, type {TRUST}=true."
        )


def check_sweep_manifest(manifest: SweepManifest, typed: Collection[str]) -> None:
    """Refuse the manifest of a stored sweep that holds flags, or that trusts a model's code without being told again.

    Raises:
        ConfigError: names the stored override.
    """
    overrides = [*manifest.arguments, *(override for job in manifest.jobs for override in job.overrides)]
    for override in overrides:
        if override.startswith("-") and not override.startswith("--config-dir="):
            raise ConfigError(
                f"{manifest.folder}: {shorten(override)} is not an override: the sweep's manifest is damaged or forged."
            )
        if override.lstrip("+").startswith(f"{TRUST}=") and TRUST not in typed:
            raise ConfigError(
                f"{manifest.folder} was started with {TRUST}=true, which is not inherited: code that came with the "
                f"model would run. If you trust that code, type {TRUST}=true again."
            )


def _is_within(name: str, section: str) -> bool:
    return name == section or name.startswith(f"{section}.")


def _risky_settings(hydra: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of settings below `hydra` that call, open or set something and are not the defaults."""
    yield from (f"hydra.callbacks.{name}" for name in hydra.get("callbacks") or {})
    for plugin, settable in _SETTABLE_OF_PLUGINS.items():
        chosen, registered = hydra.get(plugin) or {}, _registered_plugin(plugin, hydra)
        for key in {*chosen, *registered}:
            differs = key not in settable and chosen.get(key) != registered.get(key)
            if differs or "_target_" in _keys(chosen.get(key)):
                yield f"hydra.{plugin}.{key}"
    for logging in ("job_logging", "hydra_logging"):
        if (hydra.get(logging) or {}).get("root") is not None:  # else Hydra configures no logging
            yield f"hydra.{logging}"
    if hydra["job"].get("env_set"):
        yield "hydra.job.env_set"


def _registered_plugin(plugin: str, hydra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the chosen launcher or sweeper as the plugin registered it."""
    choice = hydra["runtime"]["choices"].get(f"hydra/{plugin}")
    try:
        node = ConfigStore.instance().load(f"hydra/{plugin}/{choice}.yaml").node
    except ConfigLoadError:
        return {}
    config = OmegaConf.to_container(node, resolve=False)
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def check_references(settings: list[Any]) -> None:
    """Refuse settings whose references to each other, resolved, could fill any memory.

    Raises:
        ConfigError: more references or characters than a config may have.
    """
    texts = list(_texts(settings))
    references = sum(environment.REFERENCE.sub("", text).count("${") for text in texts)
    characters = sum(map(len, texts))
    if references > _MAX_REFERENCES or characters > _MAX_CHARACTERS:
        raise ConfigError(
            f"The settings hold {references} references (${{…}}) to other settings and {characters:,} characters of "
            f"text: more than {_MAX_REFERENCES} references or {_MAX_CHARACTERS:,} characters are refused."
        )


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
