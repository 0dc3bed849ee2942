"""The device that MLX computes on."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import mlx.core as mx


def on_cpu() -> bool:
    """Return whether MLX's default device is the CPU, where only float32 matrix products are fast."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def device_identity() -> dict[str, Any]:
    """Return what the last digits depend on beside versions and CPU: on a GPU its chip and whether float32 products may
    be computed in TF32, and on a Mac the system, which brings the kernels of Metal and the BLAS of the CPU."""
    identity: dict[str, Any] = {}
    if not on_cpu():
        identity["chip"] = str(mx.device_info().get("architecture"))
        identity["tf32"] = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    if sys.platform == "darwin":
        identity["macos"] = platform.mac_ver()[0]
    return identity
