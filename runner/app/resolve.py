"""From a composed DictConfig to checked dataclasses, and to what config.yaml holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runner import loggers
from runner.common.errors import ConfigError
from runner.config import schema, validation
from runner.config.schema import Config


def resolve_config(cfg: DictConfig) -> Config:
    """The composed config as checked dataclasses, with absolute paths.

    Raises:
        ConfigError: a value that cannot be, or one that looks like a secret.
    """
    validation.refuse_secrets(OmegaConf.to_container(cfg, resolve=False))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError("\n".join(f"{m} has no value: choose {m.split('.')[0]}=NAME or set it." for m in missing))
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    validation.validate(config)
    config = validation.fill_defaults(config)
    loggers.build(config.loggers)  # opens nothing: refuses an unknown logger or option
    for section in (config.model, config.data):
        section.path = _absolute(section.path)
    if config.adapter:
        config.adapter = _absolute(config.adapter)
    return config


def require_adapter(config: Config) -> None:
    """Refuse a warm start from nothing before a directory is made for the run.

    Raises:
        ConfigError: names the path.
    """
    if config.adapter and not os.path.exists(config.adapter):
        raise ConfigError(f"adapter={config.adapter}: there is no such file or folder.")


def stored_config(cfg: DictConfig, config: Config) -> dict[str, Any]:
    """What config.yaml holds: every setting resolved, except that ${oc.env:…} stays as written."""
    data = schema.to_dict(config)
    _keep_environment(data, OmegaConf.to_container(cfg, resolve=False))
    return data


def _absolute(path: str) -> str:
    found = os.path.expanduser(path)
    return os.path.abspath(found) if os.path.exists(found) else path


def _keep_environment(data: dict[str, Any], raw: Any) -> None:
    for key, value in raw.items() if isinstance(raw, Mapping) else ():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict):
            _keep_environment(data[key], value)
        elif isinstance(value, str) and "${oc.env" in value:
            data[key] = value
