"""From a composed config to checked dataclasses, and to what config.yaml holds."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runner import loggers
from runner.common.errors import ConfigError
from runner.config import environment, serialize, validation
from runner.config.schema import Config


def resolve_config(composed: DictConfig) -> Config:
    """Return the `composed` config as checked dataclasses, with absolute paths.

    Raises:
        ConfigError: a setting is missing, invalid, or looks like a secret.
    """
    validation.refuse_secrets(OmegaConf.to_container(composed, resolve=False))
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError("\n".join(map(validation.missing_value, missing)))
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise ConfigError("The config is not checked by the schema: its defaults list must start with `- schema`.")
    validation.validate(config)
    config = validation.fill_defaults(config)
    loggers.build(config.loggers)  # opens nothing: refuses an unknown logger or option, or a missing package
    validation.make_paths_absolute(config)
    loggers.make_locations_absolute(config.loggers)
    return config


def resolve_to_start(composed: DictConfig, stop_at: int | None, *, needs_adapter: bool) -> Config:
    """Return the `composed` config as `resolve_config` does, if a run can start with it and stop after `stop_at`.

    Args:
        needs_adapter: whether `adapter`, if set, must exist; a resumed run need not have it any more.

    Raises:
        ConfigError: as `resolve_config`; `stop_at` lies beyond the last update, or there is no such adapter.
    """
    config = resolve_config(composed)
    if stop_at is not None and config.train.epochs is None and stop_at > config.train.iters:
        raise ConfigError(f"train.stop_at={stop_at} is invalid: must be at most train.iters={config.train.iters}.")
    if needs_adapter and config.adapter and not os.path.exists(config.adapter):
        raise ConfigError(f"adapter={config.adapter}: there is no such file or folder.")
    return config


def config_to_store(composed: DictConfig, config: Config) -> dict[str, Any]:
    """Return what config.yaml holds: the resolved `config`, but references to the environment as written."""
    stored = serialize.to_dict(config)
    written = OmegaConf.to_container(composed, resolve=False)
    if "${" in str(written):
        environment.keep_references(stored, _resolve_but_environment(written))
    return stored


def _resolve_but_environment(written: Any) -> Any:
    """Return a config as `written`, resolved but for texts with a reference to the environment, which stay so.

    So `data.path=${model.path}` becomes `${oc.env:DIR}` where `model.path=${oc.env:DIR}`.
    """
    return OmegaConf.to_container(OmegaConf.create(environment.escape_references(written)), resolve=True)
