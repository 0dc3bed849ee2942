"""Loggers: where metrics rows go besides metrics.jsonl. A logger is one file with one class and one line here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import shorten

LOGGERS = {"csv": "runner.loggers.csv:CsvLogger"}
"""Name in conf/loggers/ to the class that is imported when it is chosen."""


class Logger(Protocol):
    """A logger. Its constructor takes the options of its section in the config as keyword arguments."""

    def open(self, run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Open the logger for the run in the directory `run`.

        Args:
            rows: those that metrics.jsonl holds: none for a new run; after a resume those up to the checkpoint; in a
                branch those of the run that it left. What was logged beyond them has to be taken back.
        """

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row that was appended to metrics.jsonl."""

    def close(self) -> None:
        """Close the logger at the end of the process, whether the run finished or not."""


def build(settings: Mapping[str, Any]) -> list[Logger]:
    """Build the loggers that the config names. Nothing is opened, so that this also checks the config.

    Raises:
        ConfigError: an unknown logger or option.
    """
    loggers: list[Logger] = []
    for name, options in settings.items():
        logger_class = _load(name)
        if not isinstance(options, Mapping | None):
            raise ConfigError(f"loggers.{name}={shorten(options)} is invalid: must be a section of options.")
        options = dict(options or {})
        try:
            inspect.signature(logger_class).bind(**options)
        except TypeError as error:
            for option in options:
                require_option(name, option)
            raise ConfigError(f"loggers.{name}: {error}.") from None
        loggers.append(logger_class(**options))
    return loggers


def require_option(name: str, option: str | None = None) -> None:
    """Refuse an option that the logger `name` does not have; without an option, check the name alone.

    Raises:
        ConfigError: an unknown logger or option.
    """
    known = [f"loggers.{name}.{parameter}" for parameter in inspect.signature(_load(name)).parameters]
    typed = f"loggers.{name}.{option}"
    if option is not None and typed not in known:
        raise ConfigError(
            f"{shorten(typed)} is not an option of the logger {name}: {', '.join(known)}.{did_you_mean(typed, known)}"
        )


def _load(name: str) -> Callable[..., Logger]:
    if name not in LOGGERS:
        raise ConfigError(
            f"loggers.{shorten(name)} is not a logger: {', '.join(LOGGERS)}.{did_you_mean(name, LOGGERS)}"
        )
    module, _, cls = LOGGERS[name].partition(":")
    logger_class: Callable[..., Logger] = getattr(importlib.import_module(module), cls)
    return logger_class
