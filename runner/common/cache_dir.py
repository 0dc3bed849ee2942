"""The folder in which caches are kept: the only one outside output directories that is written by default."""

from __future__ import annotations

import os
from pathlib import Path

CACHES = ("baselines", "batches", "checks", "tokenizers", "tokens", "trunk")
"""The subfolders that are a `DiskCache`: `runner clean --caches` removes entries of these alone: other
programs may use the folder, too."""


def cache_dir() -> Path:
    """Return $RUNNER_CACHE, else mlx-runner/ in $XDG_CACHE_HOME (if that is an absolute path), else in ~/.cache."""
    if path := os.environ.get("RUNNER_CACHE"):
        return Path(path).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache") / "mlx-runner"
