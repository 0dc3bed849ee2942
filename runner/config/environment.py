"""References to environment variables in settings: `${oc.env:NAME}` and `${oc.env:NAME,default}`.

A stored config keeps them as written, so that no value of a variable reaches the disk. Hydra resolves them where a run
starts; the commands that read a stored config without Hydra resolve them here, in the same way.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from runner.common.errors import ConfigError
from runner.common.text import shorten
from runner.config import schema

REFERENCE = re.compile(r"\$\{\s*oc\.env\s*:\s*(\w+)\s*(?:,([^{}]*))?\}")
"""A reference without others inside it: the variable and its default."""
_REFERENCE_START = re.compile(r"\$\{\s*oc\.env\s*:")  # OmegaConf allows the spaces
_MIN_SECRET_LENGTH = 4
"""A shorter value is no secret, and replacing it would change unrelated text."""


def has_reference(text: str) -> bool:
    """Return whether a part of `text` comes from the environment, so that its resolved form may be a secret."""
    return _REFERENCE_START.search(text) is not None


def resolve(settings: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Return the nested `settings` with every reference replaced by the variable's value, read as its setting's type.

    Args:
        settings: settings by section, as in config.yaml.
        where: the file, for messages.
        prefix: dotted name of the section that `settings` is, with a dot at its end.

    Raises:
        ConfigError: a variable is not set, or another kind of reference.
    """
    resolved: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            resolved[key] = resolve(value, where, f"{name}.")
        elif isinstance(value, str) and "${" in value:
            resolved[key] = parse_value(name, _replace_references(value, f"{where}: {name}"))
        else:
            resolved[key] = value
    return resolved


def escape_references(value: Any) -> Any:
    """Return a copy of the nested `value` in which OmegaConf takes every text with a reference as it is written."""
    if isinstance(value, Mapping):
        return {key: escape_references(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape_references(item) for item in value]
    if isinstance(value, str) and has_reference(value):
        return re.sub(r"(?<!\\)\$\{", r"\\${", value)
    return value


def keep_references(settings: dict[str, Any], written: Any) -> None:
    """Put each reference of `written`, the settings before they were resolved, back into the resolved `settings`."""
    for key, value in written.items() if isinstance(written, Mapping) else ():
        texts = value if isinstance(value, list) else [value]
        if isinstance(value, Mapping) and isinstance(settings.get(key), dict):
            keep_references(settings[key], value)
        elif any(isinstance(text, str) and has_reference(text) for text in texts):
            settings[key] = value


def referenced_values(settings: Any, written: Any) -> Iterator[tuple[str, str]]:
    """Yield each text in the resolved `settings` that came from the environment, with the reference in `written`."""
    if isinstance(settings, Mapping) and isinstance(written, Mapping):
        for key, value in settings.items():
            yield from referenced_values(value, written.get(key))
    elif isinstance(settings, str) and isinstance(written, str) and has_reference(written):
        yield settings, written


def redacted(text: str, settings: Any, written: Any) -> str:
    """Return `text` with ${oc.env:NAME} in place of each value that came from the environment.

    `settings` and `written` as in `referenced_values`.
    """
    for value, reference in sorted(referenced_values(settings, written), key=lambda pair: -len(pair[0])):
        if len(value) >= _MIN_SECRET_LENGTH:
            text = text.replace(value, reference)
    return text


def parse_value(name: str, text: str) -> Any:
    """Return the value that `text` stands for as the setting `name`: text stays text, the rest is read as YAML.

    Raises:
        ConfigError: `text` is not a value.
    """
    hint = schema.type_of(name)
    types = typing.get_args(hint) or (hint,)
    if type(None) in types and text in ("null", ""):
        return None
    if str in types:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{name}={text} cannot be read.") from None


def _replace_references(text: str, where: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if name in os.environ:
            return os.environ[name]
        if default is None:
            raise ConfigError(f"{where} is {shorten(text)}, and the environment variable {name} is not set.")
        return str(default).strip().strip("'\"")

    if "${" in REFERENCE.sub("", text):
        raise ConfigError(
            f"{where} is {shorten(text)}, of which only ${{oc.env:NAME}} can be resolved here: type the setting."
        )
    return REFERENCE.sub(value_of, text)
