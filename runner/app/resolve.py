"""From a composed config to checked dataclasses, and to what config.yaml holds."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runner import loggers
from runner.common.errors import ConfigError
from runner.config import environment, serialize, validation
from runner.config.schema import Config


def resolve_config(config: DictConfig) -> Config:
    """Return the composed `config` as checked dataclasses, with absolute paths.

    Raises:
        ConfigError: a setting is missing, invalid, or looks like a secret.
    """
    validation.refuse_secrets(OmegaConf.to_container(config, resolve=False))
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError("\n".join(map(validation.missing_value, missing)))
    settings = OmegaConf.to_object(config)
    if not isinstance(settings, Config):
        raise ConfigError("The config is not checked by the schema: its defaults list must start with `- schema`.")
    validation.validate(settings)
    settings = validation.fill_defaults(settings)
    loggers.build(settings.loggers)  # opens nothing: refuses an unknown logger or option
    validation.make_paths_absolute(settings)
    return settings


def require_adapter(settings: Config) -> None:
    """Refuse a warm start from a path that does not exist.

    Raises:
        ConfigError: names the path.
    """
    if settings.adapter and not os.path.exists(settings.adapter):
        raise ConfigError(f"adapter={settings.adapter}: there is no such file or folder.")


def config_to_store(config: DictConfig, settings: Config) -> dict[str, Any]:
    """Return what config.yaml holds: the resolved `settings`, but references to the environment as written."""
    stored = serialize.to_dict(settings)
    environment.keep_references(stored, _resolve_but_environment(config))
    return stored


def _resolve_but_environment(config: DictConfig) -> Any:
    """Return the composed settings, resolved but for texts with a reference to the environment, which stay as written.

    So `data.path=${model.path}` becomes `${oc.env:DIR}` where `model.path=${oc.env:DIR}`.
    """
    written = OmegaConf.to_container(config, resolve=False)
    return OmegaConf.to_container(OmegaConf.create(environment.escape_references(written)), resolve=True)
