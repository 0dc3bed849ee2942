"""Folders that stock mlx-lm loads: an adapter folder, and a model folder with weights, config and tokenizer."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from runner.checkpoints.safetensors_file import require_finite, unpack
from runner.common.atomic_io import create_atomically
from runner.common.errors import ModelError, StorageError
from runner.common.filesystem import FileSystem, is_apple_double
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.common.storage_errors import insufficient_space, storage_errors
from runner.export.verify_export import verify_model_folder
from runner.models.load import BaseModel

_COPIED_FILES = ("*.py", "generation_config.json")
"""Files of a model folder that loading it needs and that neither mlx-lm nor the tokenizer writes."""


def check_adapter(folder: Path, weights: bytes, config: Mapping[str, Any]) -> None:
    """Check that stock mlx-lm would load the adapter in `folder`, given its weights file and its parsed config.

    Raises:
        CheckpointError: the weights are damaged or not finite.
        ModelError: the config does not give the number of adapted blocks.
    """
    where = str(folder / ADAPTERS)
    require_finite(unpack(weights, where=where)[0], where=where)
    num_layers = config.get("num_layers")
    if type(num_layers) is not int or num_layers < 1:  # mlx-lm reads -1 as "no block"
        raise ModelError(f"{folder / ADAPTER_CONFIG}: num_layers is {num_layers}; mlx-lm needs the number of blocks.")


def export_model(base: BaseModel, target: Path) -> None:
    """Create the model folder `target` (see `write_model_folder`), complete and loadable or not at all.

    Raises:
        ModelError: stock mlx-lm would not read the same model from it.
        ConfigError, StorageError: `target` exists, there is too little space, or the disk fails.
    """
    with create_atomically(target, is_folder=True) as folder:
        write_verified_folder(base, folder, target)


def write_verified_folder(base: BaseModel, folder: Path, target: Path) -> None:
    """Write `base` into `folder`, which will be named `target`, and check that stock mlx-lm reads the same model.

    Raises:
        ModelError: it does not.
        StorageError: there is too little space, or the disk fails.
    """
    require_space(sum(array.nbytes for _, array in tree_flatten(base.model.parameters())), folder.parent)
    try:
        with storage_errors(target, "written"):
            write_model_folder(base, folder)
    except RuntimeError as error:  # MLX reports a failed write as a RuntimeError
        raise StorageError(f"{target} cannot be written: {' '.join(str(error).split())[:200]}") from error
    verify_model_folder(base, folder, target)


def require_space(needed: int, folder: Path) -> None:
    """Raise StorageError where the disk of `folder` has less than `needed` bytes free."""
    free = FileSystem().free_space(folder)
    if needed > free:
        raise insufficient_space(folder, needed=needed, free=free)


def write_model_folder(base: BaseModel, folder: Path) -> None:
    """Write weights, config.json and tokenizer of `base`, which carries no adapter, into `folder`.

    Stock `mlx_lm.load` returns the same model: quantized layers stay quantized and each array keeps its dtype.
    """
    from mlx_lm.utils import save_config, save_model

    mx.eval(base.model.parameters())
    save_model(folder, base.model)
    config = copy.deepcopy(base.config)
    dtype = str(_prevailing_dtype(base)).removeprefix("mlx.core.")
    config.update({key: dtype for key in ("torch_dtype", "dtype") if key in config})
    has_vision = "vision_tower" in getattr(base.model, "model", {})
    save_config(config, folder / "config.json", keep_vision_config=has_vision)
    base.tokenizer.save_pretrained(folder)
    if base.folder is not None:
        for pattern in _COPIED_FILES:
            for file in base.folder.glob(pattern):
                if not is_apple_double(file.name):
                    shutil.copyfile(file, folder / file.name)


def _prevailing_dtype(base: BaseModel) -> mx.Dtype:
    """Return the dtype that most floating-point elements have."""
    counts: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(base.model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            counts[array.dtype] = counts.get(array.dtype, 0) + array.size
    return max(counts, key=lambda dtype: counts[dtype])
