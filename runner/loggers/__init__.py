"""Loggers: where metrics rows go besides metrics.jsonl. A backend is one file with one class and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from runner.common.errors import ConfigError, did_you_mean

BACKENDS = {"csv": "runner.loggers.csv:CsvLogger"}
"""Name in conf/loggers/ to the class that is imported when it is chosen."""


class Logger(Protocol):
    """A backend. Its constructor takes the options of its key in the config as keyword arguments."""

    def open(self, run: Path, step: int) -> None:
        """Begin, or go on after `step`: what was logged beyond it is taken back."""

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""

    def close(self) -> None:
        """The run ends or stops."""


def build(settings: Mapping[str, Any]) -> list[Logger]:
    """The loggers that the config names.

    Raises:
        ConfigError: an unknown backend or option.
    """
    made: list[Logger] = []
    for name, options in settings.items():
        if name not in BACKENDS:
            raise ConfigError(f"loggers.{name} is not a backend: {', '.join(BACKENDS)}.{did_you_mean(name, BACKENDS)}")
        module, _, cls = BACKENDS[name].partition(":")
        try:
            made.append(getattr(importlib.import_module(module), cls)(**(options or {})))
        except TypeError as error:
            raise ConfigError(f"loggers.{name}: {error}.") from error
    return made
