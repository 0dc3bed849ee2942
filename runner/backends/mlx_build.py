"""Which build of MLX is installed, and so what it computes on; known without importing it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path


def mlx_build() -> str:
    """Return the build of MLX that a process of this environment would import.

    ``metal`` (Macs with Apple Silicon), ``cuda``, ``cpu`` (the ``mlx-cpu`` wheel of Linux), ``own`` (any other, such as
    one that was compiled here) or ``missing`` (the bare ``mlx`` package of Linux, without a backend).
    """
    if sys.platform == "darwin":
        return "metal" if platform.machine() == "arm64" else "own"
    if sys.platform != "linux":
        return "own"
    if installed("mlx-cuda-12") or installed("mlx-cuda-13"):
        return "cuda"
    if installed("mlx-cpu"):
        return "cpu"
    core = installed("mlx")
    return "missing" if core and not Path(str(core.locate_file("mlx/lib/libmlx.so"))).exists() else "own"


def is_gpu_build() -> bool:
    """Return whether MLX computes on a GPU, which processes that run at once would share."""
    return mlx_build() in ("metal", "cuda")


def installed(name: str) -> importlib.metadata.Distribution | None:
    """Return the distribution `name` of this environment, if it has one."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
