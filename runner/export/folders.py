"""A base model written as a folder that stock mlx-lm loads, and an adapter merged into its base."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from runner.models.load import BaseModel
from runner.models.lora import AdaptedModel

_BESIDE = ("*.py", "generation_config.json")
"""What a model folder holds beside weights, config and tokenizer that loading it elsewhere needs."""


def write_model_folder(base: BaseModel, path: Path) -> None:
    """Write `base` (no adapter on it) into the folder `path`: weights, config.json and tokenizer.

    Stock `mlx_lm.load` gives the same model: quantized layers stay quantized, each array keeps its dtype.
    """
    from mlx_lm.utils import save_config, save_model

    mx.eval(base.model.parameters())
    save_model(path, base.model)
    about = copy.deepcopy(base.config)
    dtype = str(_dtype(base)).removeprefix("mlx.core.")
    about.update({key: dtype for key in ("torch_dtype", "dtype") if key in about})
    vision = "vision_tower" in getattr(base.model, "model", {})
    save_config(about, path / "config.json", keep_vision_config=vision)
    base.tokenizer.save_pretrained(path)
    if (source := _folder_of(base.source)) is not None:
        for file in (file for pattern in _BESIDE for file in source.glob(pattern)):
            shutil.copyfile(file, path / file.name)


def fuse_adapter(adapted: AdaptedModel, *, dequantize: bool) -> BaseModel:
    """The base with the adapter's update added to its weights; the adapter is gone afterwards.

    A quantized layer that the adapter touches is expanded, changed and quantized again as it was, which rounds the
    update; with `dequantize` the whole model is expanded instead and nothing is rounded.
    """
    model, about = adapted.model, copy.deepcopy(adapted.base.config)
    merged = [(name, m.fuse(dequantize=dequantize)) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(merged))
    if dequantize:
        from mlx_lm.utils import dequantize_model

        model = dequantize_model(model)
        about.pop("quantization", None)
        about.pop("quantization_config", None)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return BaseModel(model, adapted.base.tokens, about, adapted.base.source, fingerprint="")


def size_of(base: BaseModel) -> int:
    """Bytes of the weights."""
    return sum(array.nbytes for _, array in tree_flatten(base.model.parameters()))


def _dtype(base: BaseModel) -> mx.Dtype:
    """The dtype of most floating values."""
    sizes: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(base.model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda dtype: sizes[dtype])


def _folder_of(source: str) -> Path | None:
    """Where the base came from, if that is a folder: itself, or the hub's cache of it."""
    if source.startswith("builtin:") or source.endswith(".gguf"):
        return None
    if Path(source).is_dir():
        return Path(source)
    from mlx_lm.utils import hf_repo_to_path

    try:
        found: Path = hf_repo_to_path(source)
    except (OSError, ValueError):  # the cache holds another revision only
        return None
    return found
