"""`data.window: null` of earlier versions, which left the window to the backend: such runs keep their order of batches.

A checkpoint records the window that was used; only the oldest do not, and there the backend decides as it did then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runner.backends.protocol import Backend
from runner.backends.select import window_of_earlier_versions
from runner.config.schema import Config


def fill_window(config: Config, window: int | None) -> Config:
    """Return `config` with `window` as data.window where it is null."""
    return replace(config, data=replace(config.data, window=config.data.window or window))


def fill_stored_window(settings: Mapping[str, Any], window: int | None) -> dict[str, Any]:
    """Return flat stored `settings` with `window` as data.window where it is null."""
    is_null = settings.get("data.window", 0) is None
    return {**settings, "data.window": window} if is_null else dict(settings)


def window_of_run(config: Config, recorded: int | None, backend: Backend) -> int:
    """Return the window of the run's order of batches: the one that its checkpoint `recorded`, else the config's."""
    return recorded or config.data.window or window_of_earlier_versions(backend, config)
