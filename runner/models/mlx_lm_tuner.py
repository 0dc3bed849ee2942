"""mlx-lm's adapter layers, imported without the logging libraries that its trainer imports with them where it can.

Weights & Biases makes folders for temporary files when it is imported, which a killed run leaves behind, and reads its
environment variables.
"""

from __future__ import annotations

import importlib
import sys

_LOGGERS = ("wandb", "swanlab")


def _import_tuner() -> None:
    hidden = [name for name in _LOGGERS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importing it fails
    try:
        importlib.import_module("mlx_lm.tuner")
    finally:
        for name in hidden:
            del sys.modules[name]


_import_tuner()

from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear  # noqa: E402

__all__ = ["LoRAEmbedding", "LoRALinear", "LoRASwitchLinear"]
