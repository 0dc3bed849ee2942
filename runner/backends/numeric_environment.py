"""The part of the numeric environment that all backends share."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from runner import __version__
from runner.backends import blas
from runner.models.device import device_identity
from runner.models.split_model import SplitModel


def common_environment(split_model: SplitModel) -> dict[str, Any]:
    """Return versions, device, BLAS and the number of blocks whose hidden states come from the cache."""
    return {
        "runner": __version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(mx.default_device()),
        "blas": blas.identity(),
        "trunk": split_model.frozen_blocks,
        **device_identity(),
    }
