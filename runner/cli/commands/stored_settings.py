"""A stored run's settings for a command: read without Hydra, changed by the few overrides that a command may have."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common.commands import repeat_command
from runner.common.errors import ConfigError, did_you_mean
from runner.common.safe_yaml import load_yaml_file
from runner.config import environment, groups, schema, serialize, validation
from runner.config.schema import Config, ModelConfig
from runner.runs.directory import RunDirectory

NUMERIC_SETTINGS = (
    "model.dtype",
    "model.dequantize",
    "model.quantize.bits",
    "model.quantize.group_size",
    "model.quantize.mode",
)
"""Settings that give the same base model other values in memory."""
CHANGEABLE = (
    "model.path",
    "model.revision",
    "model.trust_remote_code",
    *NUMERIC_SETTINGS,
    *(name for name in serialize.default_settings() if name.startswith("data.")),
    "train.batch_size",
    "train.eval_batches",
)
CHOOSABLE = ("data", "method")
"""Groups of which another choice can be typed: method=sft measures a run of pairs on rows that have one answer."""
_TEMPLATE_ARGS = "data.template_args."
_OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class StoredSettings:
    """A run's settings as a command uses them."""

    config: Config
    trained_model: ModelConfig
    """The model with the dtype and quantization of the training, at the path that was typed if one was."""
    typed: frozenset[str]
    """Names of the settings that were typed."""


def read_settings(run: Path, overrides: Sequence[str] = ()) -> StoredSettings:
    """Return the settings stored in `run`, changed by `overrides` such as `data=tiny` and `model.path=folder`.

    Raises:
        ConfigError: an override that a command cannot have, an invalid value, or an environment variable not set.
    """
    stored = RunDirectory(run).read_config()
    stored.pop("loggers", None)  # no command logs, so their environment variables are not needed
    typed: dict[str, Any] = {}
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            hint = did_you_mean(override, [*CHOOSABLE, *CHANGEABLE])
            raise ConfigError(f"'{override}' is not a setting (key=value).{hint}")
        name, value = match["key"], match["value"]
        if name in CHOOSABLE:
            stored[name] = _group_settings(name, value)
        elif name.startswith(_TEMPLATE_ARGS):
            former = typed.get("data.template_args", stored.get("data", {}).get("template_args") or {})
            typed["data.template_args"] = former | {
                name.removeprefix(_TEMPLATE_ARGS): environment.parse_value(name, value)
            }
        else:
            _require_changeable(name, run, override)
            typed[name] = environment.parse_value(name, value)
    where = str(run / "config.yaml")
    trained = serialize.from_dict(environment.resolve(stored, where), where)
    config = copy.deepcopy(trained)
    for name, value in typed.items():
        serialize.set_value(config, name, value)
        if name not in NUMERIC_SETTINGS:
            serialize.set_value(trained, name, value)
    config = serialize.from_dict(serialize.to_dict(config), "the command line")  # checks the types of what was typed
    validation.validate(config)
    validation.make_paths_absolute(trained)
    validation.make_paths_absolute(config)
    return StoredSettings(config, trained.model, frozenset(typed))


def _require_changeable(name: str, run: Path, override: str) -> None:
    if name in CHANGEABLE:
        return
    if name in serialize.default_settings():
        raise ConfigError(
            f"{name} belongs to how the run was trained and cannot change here. These can: model.path and the other "
            "settings of the base model, data.…, method=NAME, train.batch_size, train.eval_batches. "
            f"For a new run with it: {repeat_command(run, shlex.quote(override))}"
        )
    if name in schema.GROUPS:
        raise ConfigError(
            f"{name}= cannot be chosen here: only data=NAME and method=NAME can. For the model: model.path=…"
        )
    raise ConfigError(validation.unknown_setting(name, [*CHOOSABLE, *CHANGEABLE]))


def _group_settings(group: str, choice: str) -> dict[str, Any]:
    choice, choices = choice.removesuffix(".yaml"), groups.group_choices(group)
    if choice not in choices:
        raise ConfigError(
            f"{group}={choice} is not a choice: {', '.join(choices)}.{did_you_mean(choice, choices)} "
            f"For files of your own: {group}.path=…"
        )
    return load_yaml_file(groups.CONF_DIR / group / f"{choice}.yaml", missing=f"{group}={choice} is not there.")
