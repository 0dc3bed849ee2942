"""`model.dtype` and `model.dequantize` on `auto`: the device's choice at a run's first start, which the run keeps.

A base model that is kept in 16 bits or quantized has other weights than an expanded one, so a run that chose anew on
each device could not be resumed on another. The choice is recorded in each checkpoint (train_state.json) and adapter
(adapter_config.json); config.yaml keeps `auto`, so that a new run with its settings chooses for its own device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runner.config.schema import ModelConfig
from runner.models.device import on_cpu

ADAPTER_FIELD = "base_precision"
"""Key of the recorded choice in adapter_config.json."""
_CHOICES = {True: {"dtype": "float32", "dequantize": "always"}, False: {"dtype": "native", "dequantize": "never"}}
"""By whether the device is the CPU: there only float32 products are fast."""
_VALUES = {"dtype": ("native", "float32", "bfloat16", "float16"), "dequantize": ("always", "never")}


def resolve_auto(model: ModelConfig, recorded: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return `model` with `recorded` in place of `auto`, or where nothing is recorded this device's choice."""
    return _filled(model, {**_CHOICES[on_cpu()], **(recorded or {})})


def on_the_other_device(model: ModelConfig) -> ModelConfig:
    """Return `model` with what `auto` means on a GPU if this is the CPU, and on the CPU if this is a GPU."""
    return _filled(model, _CHOICES[not on_cpu()])


def precision_of(model: ModelConfig) -> dict[str, str]:
    """Return what a run records of `model`: dtype and dequantize, neither of them `auto`."""
    resolved = resolve_auto(model)
    return {"dtype": resolved.dtype, "dequantize": resolved.dequantize}


def recorded_precision(recorded: object, device: object = None) -> dict[str, str]:
    """Return the valid part of what a checkpoint or adapter has `recorded`.

    Of one that is older than the record it is what `auto` meant on its `device`, such as "Device(gpu, 0)", if that is
    known.
    """
    if isinstance(recorded, Mapping):
        return {name: recorded[name] for name, values in _VALUES.items() if recorded.get(name) in values}
    return dict(_CHOICES["cpu" in device]) if isinstance(device, str) else {}


def _filled(model: ModelConfig, choice: Mapping[str, str]) -> ModelConfig:
    return replace(
        model,
        dtype=choice["dtype"] if model.dtype == "auto" else model.dtype,
        dequantize=choice["dequantize"] if model.dequantize == "auto" else model.dequantize,
    )
