"""The small model as MLX folders, written once: ``python -m benchmarks.models`` prints their paths.

``hub`` holds the weights in bfloat16, as the hub has this model; ``float32`` the same before that rounding. Stock
mlx-lm on the quantized weights is not measured: its CPU products of 4 bits with bfloat16 are 20 times slower still.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

HUB, FLOAT32 = "hub", "float32"


def folders() -> dict[str, str]:
    """Return the path of each folder by name; missing ones are written."""
    from runner.backends import blas

    blas.load_blas()
    from runner.common.atomic_io import create_atomically
    from runner.config import schema
    from runner.export.mlx import write_model_folder
    from runner.models import fetch
    from runner.models.load import load_base_model

    settings = {
        HUB: schema.ModelConfig(path="builtin:smollm2_135m", dtype="bfloat16", dequantize="always"),
        FLOAT32: schema.ModelConfig(path="builtin:smollm2_135m", dtype="float32", dequantize="always"),
    }
    source = fetch.BUILTIN_MODELS["smollm2_135m"].sha256.encode()
    version = hashlib.sha256(source + Path(__file__).read_bytes()).hexdigest()[:12]
    found = {}
    for name, chosen in settings.items():
        folder = cache() / "models" / f"smollm2_135m-{name}-{version}"
        if not folder.is_dir():
            with create_atomically(folder, is_folder=True) as new_folder:
                write_model_folder(load_base_model(chosen), new_folder)
        found[name] = str(folder)
    return found


def cache() -> Path:
    """Return the folder in which the benchmark caches models and data."""
    from runner.common.cache_dir import cache_dir

    return cache_dir() / "benchmarks"


if __name__ == "__main__":
    print(json.dumps(folders()))
