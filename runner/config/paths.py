"""Paths of a config made independent of the working directory."""

from __future__ import annotations

import os
from typing import Any

from runner.config import schema
from runner.config.schema import Config
from runner.config.setting import PathKind


def make_paths_absolute(config: Config) -> None:
    """Replace the paths of `config` in place, by their kind: a resume from another directory finds the same files."""
    for name, kind in schema.path_settings().items():
        *sections, last = name.split(".")
        section: Any = config
        for section_name in sections:
            section = getattr(section, section_name)
        if getattr(section, last) is not None:
            setattr(section, last, absolute_path(getattr(section, last), kind))


def absolute_path(text: str, kind: PathKind) -> str:
    """Return an output path absolute; an input path only where it exists, since it may be a hub id or builtin:NAME."""
    expanded = os.path.expanduser(text)
    return os.path.abspath(expanded) if kind is PathKind.OUTPUT or os.path.exists(expanded) else text
