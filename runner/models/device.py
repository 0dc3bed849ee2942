"""The device that MLX computes on."""

from __future__ import annotations

import mlx.core as mx


def on_cpu() -> bool:
    """Return whether MLX's default device is the CPU, where only float32 matrix products are fast."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)
