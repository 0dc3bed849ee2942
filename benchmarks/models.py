"""The small model as MLX folders, once: ``python -m benchmarks.models`` prints where they lie.

``hub`` holds the weights in bfloat16, as the hub has this model; ``float32`` the same before that rounding. Stock
mlx-lm on the quantized weights is not measured: its CPU products of 4 bits with bfloat16 are 20 times slower still.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

HUB, FLOAT32 = "hub", "float32"


def folders() -> dict[str, str]:
    """Path of each folder by its name; those that are not there yet are written."""
    from runner.backends import blas

    blas.load_blas()
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
            with whole(folder) as fresh:
                write_model_folder(load_base_model(chosen), fresh)
        found[name] = str(folder)
    return found


def cache() -> Path:
    """Where the benchmark keeps what it makes once."""
    from runner.common.cache_dir import cache_dir

    return cache_dir() / "benchmarks"


class whole:
    """A folder that appears whole or not at all: made beside `target`, renamed to it at the end."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=self._target.parent))
        return self._fresh

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and not self._target.exists():
            os.replace(self._fresh, self._target)
        shutil.rmtree(self._fresh, ignore_errors=True)


if __name__ == "__main__":
    print(json.dumps(folders()))
