"""The one folder outside output directories that runner writes to by itself. Imports nothing of its own."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$RUNNER_CACHE, else mlx-runner/ in $XDG_CACHE_HOME (where that is an absolute path), else in ~/.cache."""
    if own := os.environ.get("RUNNER_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache") / "mlx-runner"
