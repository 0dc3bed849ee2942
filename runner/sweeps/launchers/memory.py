"""How many jobs may run at once on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from runner.backends.mlx_build import is_gpu_build
from runner.common.cores import usable_cores
from runner.common.memory import available_memory

_SHARE_OF_MEMORY = 0.8
_PROCESS_BYTES = 700_000_000
"""A process with MLX and transformers imported, without a model."""
_FACTOR = 3
"""Memory of a training job relative to its weights."""


def jobs_that_fit(models: Iterable[str], ranks: int = 1) -> int:
    """Return how many jobs fit into memory and cores, at least 1.

    On a GPU it is one: two would share its memory and its time.

    Args:
        models: the values of model.path that they use.
        ranks: processes of each job, all of which hold its model.
    """
    if is_gpu_build():
        return 1
    largest = max((_weight_bytes(model) for model in models), default=0)
    processes = int(_SHARE_OF_MEMORY * available_memory() / (_PROCESS_BYTES + _FACTOR * largest))
    return max(1, min(usable_cores(), processes) // ranks)


def _weight_bytes(model: str) -> int:
    """Return a rough size of a model's weights in memory: float32, which a .gguf of 4 to 8 bits is expanded to."""
    path = Path(model)
    if model.startswith("builtin:"):
        return 0 if model == "builtin:tiny" else 540_000_000
    if path.is_file():
        return 6 * path.stat().st_size
    if path.is_dir():
        return 2 * sum(file.stat().st_size for file in path.glob("model*.safetensors"))
    return 2_000_000_000  # on the hub: unknown before it is fetched
