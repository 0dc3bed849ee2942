"""Checks of a launcher's options, before the sweep is recorded."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
from collections.abc import Collection, Mapping
from typing import Any

from runner.common.errors import ConfigError

_CLUSTERS = ("slurm", "local", "debug")
_ADDRESS = re.compile(r"([\w.-]{1,253}|\[[0-9a-fA-F:]+\]):(\d{1,5})")
_ANSWER_SECONDS = 5.0
_NAME = re.compile(r"[\w.,:@+-]{1,200}")


def require_valid(
    options: Mapping[str, Any],
    *,
    text: Collection[str] = (),
    count: Collection[str] = (),
    amount: Collection[str] = (),
    texts: Collection[str] = (),
    names: Collection[str] = (),
) -> None:
    """Raise ConfigError for an option of a launcher that is invalid.

    Args:
        options: name below hydra.launcher to value.
        text: names of those that are a text, or null.
        count: names of those that are a whole number of 1 or more, or null.
        amount: names of those that are a number of 0 or more, or null.
        texts: names of those that are a list of texts.
        names: names of those that are a plain name, which a shell script may hold, or null.
    """
    for name, value in options.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in text and not (value is None or (isinstance(value, str) and value)):
            problem = "must be a text, or null"
        elif name in names and not (value is None or (isinstance(value, str) and _NAME.fullmatch(value))):
            problem = "must be a plain name, or null"
        elif name in count and value is not None and (type(value) is not int or value < 1):
            problem = "must be 1 or more, or null"
        elif name in amount and value is not None and not (number and value >= 0):
            problem = "must be 0 or more, or null"
        elif name in texts and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            problem = "must be a list of texts"
        else:
            continue
        raise ConfigError(f"hydra.launcher.{name}={value} is invalid: {problem}.")


def require_reachable(address: str | None) -> None:
    """Raise ConfigError for the address of a Ray cluster at which nothing answers; Ray itself would try for long."""
    if address in (None, "auto", "local"):
        return
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(
            f"hydra.launcher.address={address} is invalid: must be host:port, such as 192.168.1.10:6379, auto or local."
        )
    try:
        socket.create_connection((match[1], int(match[2])), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"hydra.launcher.address={address}: no cluster answers there ({error}). On that machine: ray status"
        ) from None


def require_cluster(name: str | None) -> None:
    """Raise ConfigError for a cluster that submitit does not know, or whose commands this machine does not have."""
    if name not in (None, *_CLUSTERS):
        raise ConfigError(f"hydra.launcher.cluster={name} is invalid: must be one of {', '.join(_CLUSTERS)}, or null.")
    if name == "slurm" and shutil.which("srun") is None:
        raise ConfigError(
            "hydra/launcher=submitit submits to SLURM, whose commands are not on this machine (srun is not found). To "
            "try it here: hydra.launcher.cluster=local"
        )


def require_package(name: str, launcher: str, extra: str | None = None) -> None:
    """Raise ConfigError where the package of a launcher is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"{launcher} needs the package {name}: pip install 'mlx-runner[{extra or name}]'")
