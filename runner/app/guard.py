"""What configs that others wrote may say to Hydra: a recipe from --config-dir, the words of a stored sweep.

Hydra calls whatever `_target_` names, configures logging by class names and sets environment variables before our
first line runs. Such keys count where they are typed on the command line; from anywhere else they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra._internal import hydra as hydra_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from omegaconf import DictConfig, OmegaConf

from runner.common import safe_yaml
from runner.common.errors import ConfigError
from runner.common.text import shorten
from runner.config.groups import CONF_DIR
from runner.runs.sweep_manifest import SweepManifest

TRUST = "model.trust_remote_code"
_CALLBACKS = {"runner": {"_target_": "runner.app.run.Opening"}}
_FREE = {"launcher": ("jobs", "n_jobs"), "sweeper": ("params",)}
"""What of Hydra's plugins a file may set."""
_MOST_REFERENCES, _MOST_TEXT = 20, 100_000
"""${…} to other settings. Each may double what the ones before it hold, and more: a few dozen fill any memory."""
_ENVIRONMENT = re.compile(r"\$\{oc\.env:[^${}]*\}")
_FOLDER = re.compile(r"\.?\w[\w.-]*")


def install_guard(typed: Collection[str]) -> None:
    """Have Hydra load configs through our checks; `typed` are its own settings on this command line."""

    class Guarded(_Loader):
        said = frozenset(typed)

    hydra_module.ConfigLoaderImpl = Guarded


class _Loader(ConfigLoaderImpl):
    said: frozenset[str] = frozenset()

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = _Repository(config_search_path)

    def load_configuration(self, *args: Any, **options: Any) -> DictConfig:
        """Every composition of Hydra's goes through here, those of a sweep's jobs too."""
        try:
            config = super().load_configuration(*args, **options)
        except RecursionError:
            raise ConfigError("A setting is nested too deeply to be read.") from None
        except KeyError as error:  # how Hydra says that a variable of hydra.job.env_copy is not set
            raise ConfigError(f"A config names {shorten(error)}, which is not there.") from None
        check_composed(config, self.said)
        return config


class _Repository(ConfigRepository):
    def load_config(self, config_path: str) -> ConfigResult | None:
        """As Hydra's own, after a look at a file that is not ours."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        # By its scheme: Hydra loads its plugins' modules twice, so it is of another class of the same name.
        if source is not None and source.scheme() == "file" and Path(source.path) != CONF_DIR:
            file = Path(source.path) / source._normalize_file_name(config_path)
            try:
                safe_yaml.require_bounded(file)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{file} cannot be read: {error}.") from None
        return super().load_config(config_path)


def check_composed(config: DictConfig, typed: Collection[str]) -> None:
    """Refuse a composed config whose files would run code, or write where nothing was typed to be written.

    Raises:
        ConfigError: names the key and what to do.
    """
    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    hydra = plain.pop("hydra")
    # A group of Hydra's own that was chosen is meant, unless another folder may have put a file under its name.
    others = any(source["provider"] == "command-line" for source in hydra["runtime"]["config_sources"])
    said = {word if others else word.replace("/", ".") for word in typed}
    for name in _suspicious(hydra):
        if not any(name == word or name.startswith(f"{word}.") or word.startswith(f"{name}.") for word in said):
            raise ConfigError(
                f"{shorten(name)} comes from a file, not from the command line, and could run code or write anywhere. "
                "If you wrote that file yourself, type the setting instead."
            )
    texts = list(_texts([plain, hydra["run"], hydra["sweep"], hydra["job"]]))
    found = sum(_ENVIRONMENT.sub("", text).count("${") for text in texts)
    if found > _MOST_REFERENCES or sum(map(len, texts)) > _MOST_TEXT:
        raise ConfigError(
            f"{found} references (${{…}}) in the settings, to other ones: more than {_MOST_REFERENCES} are refused, or "
            f"more than {_MOST_TEXT:,} characters in all."
        )
    if plain.get("model", {}).get("trust_remote_code") is True and not {"model", TRUST} & set(typed):
        raise ConfigError(
            f"{TRUST}=true comes from a file: code that came with the model would run. If you have read that code and "
            f"trust it, type {TRUST}=true."
        )


def check_sweep_manifest(known: SweepManifest, typed: Collection[str]) -> None:
    """Refuse the words of a stored sweep that are no settings, or trust a model's code when nobody does now.

    Raises:
        ConfigError: names the word.
    """
    for word in [*known.words, *(word for job in known.jobs.values() for word in job.overrides)]:
        if word.startswith("-") and not word.startswith("--config-dir="):
            raise ConfigError(
                f"{known.folder}: {shorten(word)} is no word of a sweep: its manifest is damaged or forged."
            )
        if word.lstrip("+").startswith(f"{TRUST}=") and TRUST not in typed:
            raise ConfigError(
                f"{known.folder} was started with {TRUST}=true, which is not taken over: code that came with the model "
                f"would run. If you trust that code, type {TRUST}=true again."
            )


def _suspicious(hydra: Mapping[str, Any]) -> Iterator[str]:
    """Dotted names of what would be called, opened or set, beyond what we and Hydra's own defaults say."""
    for name, value in (hydra.get("callbacks") or {}).items():
        if value != _CALLBACKS.get(name):
            yield f"hydra.callbacks.{name}"
    for part, free in _FREE.items():
        found, own = hydra.get(part) or {}, _default(part, hydra)
        for key in {*found, *own}:
            if (key not in free and found.get(key) != own.get(key)) or "_target_" in _keys(found.get(key)):
                yield f"hydra.{part}.{key}"
    for log in ("job_logging", "hydra_logging"):
        if (hydra.get(log) or {}).get("root") is not None:  # else Hydra leaves logging alone
            yield f"hydra.{log}"
    if hydra["job"].get("env_set"):
        yield "hydra.job.env_set"
    subfolder = hydra.get("output_subdir")
    if subfolder is not None and not _FOLDER.fullmatch(subfolder):
        yield "hydra.output_subdir"


def _default(part: str, hydra: Mapping[str, Any]) -> dict[str, Any]:
    """The launcher or sweeper that was chosen, as its plugin registered it."""
    choice = hydra["runtime"]["choices"].get(f"hydra/{part}")
    try:
        node = ConfigStore.instance().load(f"hydra/{part}/{choice}.yaml").node
    except ConfigLoadError:
        return {}
    found = OmegaConf.to_container(node, resolve=False)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


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
