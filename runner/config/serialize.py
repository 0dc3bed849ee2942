"""A config as nested dicts, as flat dotted names and back: every key and type of what is read is checked."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import shorten
from runner.config import environment
from runner.config.schema import OPEN_SECTIONS, Config

_LARGEST_FLOAT = 10**300


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted name to value for every setting of a config or a section; loggers is one setting."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        out.update(flatten(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value})
    return out


def flatten_dict(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted name to value for every leaf of nested dicts, empty dicts included."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping) and value
        out.update(flatten_dict(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return out


def flatten_stored(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted name to value of a config as config.yaml stores it; each open section is one value."""
    return {name: {} for name in OPEN_SECTIONS} | group_open_sections(flatten_dict(stored))


def group_open_sections(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return `flat` settings with the values of each open section that they have as one value, a dict."""
    grouped: dict[str, Any] = {}
    for name, value in flat.items():
        may_be_open = name.startswith(OPEN_SECTIONS)  # of a hundred names none or two
        section = (
            next((s for s in OPEN_SECTIONS if name == s or name.startswith(f"{s}.")), None) if may_be_open else None
        )
        if section is None:
            grouped[name] = value
        elif name == section:
            grouped[section] = value
        else:
            *sections, last = name.removeprefix(f"{section}.").split(".")
            inner = grouped.setdefault(section, {})
            for key in sections:
                inner = inner.setdefault(key, {})
            inner[last] = value
    return grouped


def change_dict(stored: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the nested `stored` config with `changes`, by dotted name."""
    config = copy.deepcopy(dict(stored))
    for name, value in changes.items():
        *sections, last = name.split(".")
        section = config
        for key in sections:
            section = section.setdefault(key, {})
        section[last] = copy.deepcopy(value)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def default_settings() -> dict[str, Any]:
    """Return dotted name to default for every setting."""
    return flatten(Config())


def set_value(config: Config, name: str, value: Any) -> None:
    """Set the setting with the dotted `name`; the value is not checked."""
    *sections, last = name.split(".")
    section: Any = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, last, value)


def from_dict(data: Mapping[str, Any], where: str) -> Config:
    """Return the Config of plain nested dicts, such as a stored config.yaml; every key and type is checked.

    Raises:
        ConfigError: an unknown key or a value of a wrong type; names `where`.
    """
    return _build(Config, data, where, "")


def _build(cls: type, data: Any, where: str, prefix: str) -> Any:
    if not isinstance(data, Mapping):
        what = prefix.rstrip(".") or "the file"
        raise ConfigError(f"{where}: {what} has to hold settings, not {shorten(format_value(data))}.")
    hints = typing.get_type_hints(cls, vars(sys.modules[cls.__module__]))
    known = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"{where}: there is no setting {prefix}{shorten(key)}.{did_you_mean(str(key), known)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(typing.cast(type, hint), value, where, f"{prefix}{key}.")
        else:
            values[key] = _coerce(hint, value, f"{where}: {prefix}{key}")
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, str) and environment.has_reference(value):
        return value  # a reference to the environment, whose value Hydra checks
    if hint is Any:
        return value  # a choice or a list of choices, which validation checks
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is list and isinstance(value, list):
        return [_coerce(args[0], v, where) for v in value]
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < _LARGEST_FLOAT else math.inf  # refused by validation
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} has to be {getattr(hint, '__name__', hint)}, not {shorten(format_value(value))}.")


def format_value(value: Any) -> str:
    """Return a value as it is typed."""
    return "null" if value is None else str(value)
