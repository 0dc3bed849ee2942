"""Settings that earlier versions had: their present names, for stored configs and for error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runner.config.invocation import INVOCATION_ARGUMENTS

RENAMED = {
    "train.trunk.cache": "train.hidden_cache.enabled",
    "train.trunk.memory_gb": "train.hidden_cache.memory_gb",
    "train.trunk.disk_gb": "train.hidden_cache.disk_gb",
    "train.trunk.folder": "train.hidden_cache.folder",
    "train.trunk.release": "train.hidden_cache.free_frozen_weights",
    "train.keep_baseline": "train.cache_baseline",
    "train.keep_checks": "train.cache_probes",
    "train.loss_piece": "train.loss_chunk",
    "train.cpu_ops": "train.cpu_engine",
    "train.native_ops": "train.cpu_native",
}
"""Old name to present name."""


def upgrade_config(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested `stored` config with present names and without retired settings; nothing else is checked."""
    config = _copy_sections(stored)
    for name in INVOCATION_ARGUMENTS:  # stored by earlier versions
        _pop(config, name)
    for old, new in RENAMED.items():
        found, value = _pop(config, old)
        if found:
            _set(config, new, value)
    return config


def upgrade_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the stored `overrides` of a sweep with present names."""
    upgraded = []
    for override in overrides:
        name, equals, value = override.partition("=")
        key = name.lstrip("+")
        upgraded.append(f"{name[: len(name) - len(key)]}{RENAMED.get(key, key)}{equals}{value}")
    return upgraded


def explain(name: str) -> str | None:
    """Return the sentence for a person who used the setting or section `name` of an earlier version, if it was one."""
    if name in RENAMED:
        return f"{name} is now {RENAMED[name]}."
    sections = {new.rpartition(".")[0] for old, new in RENAMED.items() if old.startswith(f"{name}.")}
    if len(sections) == 1:
        return f"{name} is now {sections.pop()}."
    if name in INVOCATION_ARGUMENTS:
        return f"{name} belongs to one invocation and cannot be stored in a config: type {name}=… on the command line."
    return None


def _copy_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy_sections(value) if isinstance(value, Mapping) else value for key, value in config.items()}


def _pop(config: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Remove the dotted `name` and the sections that this leaves empty; return whether it was there, and its value."""
    key, _, rest = name.partition(".")
    if not rest:
        return key in config, config.pop(key, None)
    section = config.get(key)
    if not isinstance(section, dict):
        return False, None
    found, value = _pop(section, rest)
    if found and not section:
        del config[key]
    return found, value


def _set(config: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for key in path:
        config = config.setdefault(key, {})
    config.setdefault(last, value)
