"""A stored run's settings for a verb: read without Hydra, with the few that a verb may change. No MLX."""

from __future__ import annotations

import copy
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runner.common.errors import ConfigError, did_you_mean
from runner.common.safe_yaml import load_yaml_file
from runner.common.text import shorten
from runner.config import groups, schema, validation
from runner.config.schema import Config, ModelConfig
from runner.runs.directory import RunDirectory

CHANGEABLE = (
    "model.path",
    "model.revision",
    "model.trust_remote_code",
    "model.dtype",
    "model.dequantize",
    "model.quantize.bits",
    "model.quantize.group_size",
    *(name for name in schema.default_settings() if name.startswith("data.")),
    "train.batch_size",
    "train.eval_batches",
)
NUMERICS = ("model.dtype", "model.dequantize", "model.quantize.bits", "model.quantize.group_size")
"""Settings that give the same base other numbers."""
_WORD = re.compile(r"(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,([^{}]*))?\}")


@dataclass(frozen=True)
class StoredSettings:
    """A run's settings, as a verb uses them."""

    config: Config
    as_trained: ModelConfig
    """The model with the numbers that it was trained with; a path that was typed stands here too."""
    typed: frozenset[str]
    """Names of the settings that were typed."""


def read_settings(run: Path, changes: Sequence[str] = ()) -> StoredSettings:
    """The settings stored in `run`, changed by words such as `data=tiny` and `model.path=folder`.

    Raises:
        ConfigError: a word that is no such setting, a value that cannot be, or a variable that is not set.
    """
    where = str(run / "config.yaml")
    stored = RunDirectory(run).read_config()
    stored.pop("loggers", None)  # their variables are not needed here
    typed: dict[str, Any] = {}
    for word in changes:
        match = _WORD.fullmatch(word)
        if match is None:
            raise ConfigError(f"'{word}' is not a setting (key=value).{did_you_mean(word, ['data', *CHANGEABLE])}")
        if match["key"] == "data":
            stored["data"] = _choice("data", match["value"])
        else:
            typed[_checked(match["key"])] = _value(match["key"], match["value"])
    plain = schema.from_dict(_resolved(stored, where), where)
    changed = copy.deepcopy(plain)
    for name, value in typed.items():
        _set(changed, name, value)
        if name not in NUMERICS:
            _set(plain, name, value)
    changed = schema.from_dict(schema.to_dict(changed), "what was typed")  # checks the types
    validation.validate(changed)
    for section in (plain.model, changed.model, changed.data):
        section.path = _absolute(section.path)
    return StoredSettings(changed, plain.model, frozenset(typed))


def _checked(key: str) -> str:
    if key in CHANGEABLE:
        return key
    if key in schema.default_settings():
        raise ConfigError(
            f"{key} belongs to how the run was trained and cannot change here; these can: model.path and its kin, "
            "data.…, train.batch_size, train.eval_batches. A new run with it: repeat=RUN."
        )
    if key in schema.GROUPS:
        raise ConfigError(f"{key}= cannot be chosen here: only data=NAME can. For the model: model.path=…")
    raise ConfigError(f"There is no setting '{key}'.{did_you_mean(key, ['data', *CHANGEABLE])}")


def _choice(group: str, name: str) -> dict[str, Any]:
    known = groups.group_choices(group)
    name = name.removesuffix(".yaml")
    if name not in known:
        raise ConfigError(
            f"{group}={name} is not a choice: {', '.join(known)}.{did_you_mean(name, known)} "
            f"For files of your own: {group}.path=…"
        )
    return load_yaml_file(groups.CONF_DIR / group / f"{name}.yaml", missing=f"{group}={name} is not there.")


def _value(name: str, text: str) -> Any:
    """`text` as the type that the setting has: text stays text, the rest is read as YAML."""
    hint: Any = Config
    for part in name.split("."):
        hint = typing.get_type_hints(hint).get(part) if isinstance(hint, type) else None
    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text in ("null", ""):
        return None
    if str in kinds:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{name}={text} cannot be read.") from None


def _set(settings: Config, name: str, value: Any) -> None:
    *path, last = name.split(".")
    section: Any = settings
    for part in path:
        section = getattr(section, part)
    setattr(section, last, value)


def _resolved(data: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """`data` with ${oc.env:NAME} and ${oc.env:NAME,default} replaced from the environment."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out[key] = _resolved(value, where, f"{name}.")
        elif isinstance(value, str) and "${" in value:
            out[key] = _value(name, _from_environment(value, f"{where}: {name}"))
        else:
            out[key] = value
    return out


def _from_environment(text: str, where: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ConfigError(f"{where} is {shorten(text)}, and the environment variable {match[1]} is not set.")
        return found if match[1] in os.environ else found.strip().strip("'\"")

    resolved = _FROM_ENVIRONMENT.sub(value_of, text)
    if "${" in _FROM_ENVIRONMENT.sub("", text):
        raise ConfigError(
            f"{where} is {shorten(text)}, of which only ${{oc.env:NAME}} can be resolved here: set it on the line."
        )
    return resolved


def _absolute(path: str) -> str:
    found = os.path.expanduser(path)
    return os.path.abspath(found) if os.path.exists(found) else path
