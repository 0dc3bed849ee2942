"""`data.window` where null was stored, which left it to the backend: checkpoints record what it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runner.common import layout, safe_json
from runner.common.filesystem import open_regular

WINDOW = "data.window"
_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000


def recorded_window(run: Path) -> int | None:
    """Return the window that the newest readable checkpoint of `run` records; None where none does."""
    checkpoints = run / layout.CHECKPOINTS
    try:
        names = sorted(filter(layout.STEP_NAME.fullmatch, os.listdir(checkpoints)), reverse=True)
    except OSError:
        return None
    return next((window for name in names if (window := _read(checkpoints / name)) is not None), None)


def _read(checkpoint: Path) -> int | None:
    try:
        with open(open_regular(checkpoint / layout.TRAIN_STATE, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            state: dict[str, Any] = safe_json.parse_object(file.read(_MAX_BYTES), max_values=_MAX_VALUES)
    except (OSError, ValueError):
        return None
    position = state.get("position")
    window = position.get("window") if isinstance(position, dict) else None
    return window if safe_json.is_count(window) and window > 0 else None
