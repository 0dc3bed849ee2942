"""Loggers: where metrics rows go besides metrics.jsonl. A logger is one file with one class and one line here."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import shorten

if TYPE_CHECKING:
    from runner.loggers.logged_run import LoggedRow, LoggedRun

LOGGERS = {
    "csv": "runner.loggers.csv:CsvLogger",
    "mlflow": "runner.loggers.mlflow:MlflowLogger",
    "tensorboard": "runner.loggers.tensorboard:TensorBoardLogger",
    "trackio": "runner.loggers.trackio:TrackioLogger",
    "wandb": "runner.loggers.wandb:WandbLogger",
}
"""Name in conf/loggers/ to the class that is imported when it is chosen."""


class Logger(Protocol):
    """A logger. Its constructor takes the options of its section in the config as keyword arguments, and does nothing
    else. Its methods may raise anything: `runner.loggers.background` calls them, all but `load` in a thread, where they
    may take any time.

    Its class may have `REQUIRES`, names of modules that have to be installed, and `LOCATIONS`, names of options that
    are paths, or URIs with a path.
    """

    def load(self, run: LoggedRun) -> None:
        """Import the library. Imports from two threads at once can see modules that are half initialized."""

    def open(self, run: LoggedRun) -> None:
        """Open the logger, so that it holds each of `run.rows` once, whatever it held before.

        These rows are none for a new run; after a resume those up to the checkpoint; in a branch those of the run that
        it left. What was logged beyond them is logged again: files are written anew; a service that takes nothing back
        has to leave out what it has. Called again after a failure, with all rows.
        """

    def log(self, row: LoggedRow) -> None:
        """Log a row that was appended to metrics.jsonl."""

    def close(self, state: str) -> None:
        """Close the logger at the end of the process, opened or not; `state` is that of the run, as in status.json."""


def build(settings: Mapping[str, Any]) -> dict[str, Logger]:
    """Build the loggers that the config names. Nothing is opened, so that this also checks the config.

    Raises:
        ConfigError: an unknown logger or option, or a package is not installed.
    """
    loggers: dict[str, Logger] = {}
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
        _check_types(name, options, inspect.signature(logger_class).parameters)
        loggers[name] = logger_class(**options)
        for module in getattr(logger_class, "REQUIRES", ()):
            if not _is_installed(module):
                install = f"pip install 'mlx-runner[{name}]'"
                raise ConfigError(
                    f"loggers={name} needs {module}, which is not installed: {install}, or choose other loggers."
                )
    return loggers


def make_locations_absolute(settings: Mapping[str, Any]) -> None:
    """Replace relative paths in the options of loggers in place: a resume from another directory finds the same."""
    for name, options in settings.items():
        for option in getattr(_load(name), "LOCATIONS", ()):
            options[option] = _absolute(options[option])


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


def _check_types(name: str, options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    for option, value in options.items():
        may_be_null = "None" in str(parameters[option].annotation)
        if not isinstance(value, str) and not (value is None and may_be_null):
            raise ConfigError(f"loggers.{name}.{option}={shorten(value)} is invalid: must be a text.")


def _absolute(location: str) -> str:
    scheme, separator, path = location.rpartition(":///")
    return location if "://" in path else f"{scheme}{separator}{os.path.abspath(os.path.expanduser(path))}"


def _is_installed(module: str) -> bool:
    """Return whether `module` is a package; a mere folder of its name is none, such as the one that W&B writes into."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def _load(name: str) -> Callable[..., Logger]:
    if name not in LOGGERS:
        raise ConfigError(
            f"loggers.{shorten(name)} is not a logger: {', '.join(LOGGERS)}.{did_you_mean(name, LOGGERS)}"
        )
    module, _, cls = LOGGERS[name].partition(":")
    logger_class: Callable[..., Logger] = getattr(importlib.import_module(module), cls)
    return logger_class
