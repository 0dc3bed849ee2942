"""Load a base model from `model.path`: a built-in name, a GGUF file, a model folder or a hub id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.common.errors import ModelError, RunnerError, did_you_mean
from runner.config import schema
from runner.data.lazy_tokenizer import LazyTokenizer, resolve_tokenizer
from runner.models import fetch, hub
from runner.models.device import on_cpu
from runner.models.identity import content_hash, weights_fingerprint
from runner.models.preflight import check_model_folder

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_QUANTIZED_LAYERS = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@dataclass
class BaseModel:
    """A base model with its weights in memory, frozen and in evaluation mode."""

    model: nn.Module
    lazy_tokenizer: TokenizerWrapper | LazyTokenizer
    """The tokenizer, or an object that loads it on first use; `tokenizer` returns the tokenizer itself."""
    config: dict[str, Any]
    """The model's configuration, in the format of the hub's config.json."""
    model_path: str
    """`model.path`, which adapter_config.json names as the base model."""
    fingerprint: str = ""
    """Identity of the weights, stored in checkpoints: see `identity.weights_fingerprint`."""
    content_hash: str = ""
    """Identity of everything that determines the output, used as a cache key: see `identity.content_hash`."""
    folder: Path | None = None
    """The folder that the model was read from; None for a GGUF file and a generated model."""
    notes: list[str] = field(default_factory=list)
    """Lines for the log."""

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer, loaded on first use. Raises ModelError if it cannot be loaded."""
        return resolve_tokenizer(self.lazy_tokenizer)


def load_base_model(config: schema.ModelConfig) -> BaseModel:
    """Load the base model that `config` names, convert its weights as configured, and freeze it.

    The tokenizer of a model folder is loaded on first use.

    Raises:
        ModelError: there is no such model, or it is not supported; names what.
    """
    dequantize = config.dequantize == "always" or (config.dequantize == "auto" and on_cpu())
    dtype = _DTYPES.get(config.dtype) or (mx.float32 if on_cpu() else None)
    try:
        base, code_sha256 = _read(config, dequantize, dtype)
    except (RunnerError, MemoryError):
        raise
    except Exception as error:  # mlx-lm, transformers and the hub's library raise all kinds of errors
        raise hub.load_error(config.path, error) from error
    if config.trust_remote_code:
        base.notes.append(f"model.trust_remote_code=true: code that came with {config.path} may run")
    if dequantize and _is_quantized(base.model):
        remove_quantization(base)
        base.notes.append("the quantized base is dequantized: on the CPU only float32 products are fast")
    if dtype is not None:
        _cast(base.model, dtype)
    if config.quantize.bits is not None:
        _quantize(base, config.quantize)
        if on_cpu():
            base.notes.append("model.quantize.bits: quantized products are slow on the CPU backend")
    base.model.freeze()
    base.model.eval()
    mx.eval(base.model.parameters())
    base.fingerprint = weights_fingerprint(base.model)
    base.content_hash = content_hash(base.model, base.config, base.fingerprint, code_sha256)
    return base


def remove_quantization(base: BaseModel) -> None:
    """Dequantize every quantized layer of `base` and remove the quantization from its config."""
    from mlx_lm.utils import dequantize_model

    base.model = dequantize_model(base.model)
    base.config.pop("quantization", None)
    base.config.pop("quantization_config", None)


def _read(config: schema.ModelConfig, dequantize: bool, dtype: mx.Dtype | None) -> tuple[BaseModel, str]:
    """Return the model as `config.path` holds it, and the SHA-256 of the Python code that came with it, if any."""
    path = config.path
    if path == "builtin:tiny":
        from runner.models import tiny

        return BaseModel(tiny.build_model(), tiny.build_tokenizer(), dict(tiny.CONFIG), path), ""
    if path.startswith("builtin:"):
        name, known = path.removeprefix("builtin:"), ("tiny", *fetch.BUILTIN_MODELS)
        if name not in known:
            raise ModelError(f"model.path={path} is not built in: {', '.join(known)}.{did_you_mean(name, known)}")
        return _read_gguf(fetch.fetch_model(name), config, dequantize, dtype), ""
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ModelError(f"model.path={path}: no such file.")
        return _read_gguf(Path(path), config, dequantize, dtype), ""
    return _read_folder(hub.find_model_folder(path, config.revision), config)


def _read_gguf(file: Path, config: schema.ModelConfig, dequantize: bool, dtype: mx.Dtype | None) -> BaseModel:
    from runner.models.gguf.load import load_gguf

    gguf = load_gguf(file, keep_quantized=not dequantize, dtype=dtype)
    return BaseModel(gguf.model, gguf.tokenizer, gguf.config, config.path)


def _read_folder(folder: Path, config: schema.ModelConfig) -> tuple[BaseModel, str]:
    from mlx_lm.utils import load_model, load_tokenizer

    check_model_folder(folder)
    model, model_config = load_model(folder, trust_remote_code=config.trust_remote_code)
    eos_token_ids = model_config.get("eos_token_id")

    def read_tokenizer() -> TokenizerWrapper:
        if not folder.is_dir():
            raise ModelError(f"model.path={config.path}: its folder {folder} was removed after the model was loaded.")
        extra = {"trust_remote_code": config.trust_remote_code}
        try:
            return load_tokenizer(folder, extra, eos_token_ids=eos_token_ids)
        except (RunnerError, MemoryError):
            raise
        except Exception as error:
            raise hub.load_error(config.path, error) from error

    # Code that comes with a model may read other files, so the folder does not identify the tokenizer then.
    tokenizer = LazyTokenizer(read_tokenizer, None if config.trust_remote_code else folder)
    code_file = model_config.get("model_file")  # mlx-lm has run it to build the architecture
    code_sha256 = hashlib.sha256((folder / code_file).read_bytes()).hexdigest() if code_file else ""
    return BaseModel(model, tokenizer, model_config, config.path, folder=folder), code_sha256


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, _QUANTIZED_LAYERS) for module in model.modules())


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast floating-point parameters to `dtype`, except the scales and biases of quantized layers."""
    quantized = {name for name, module in model.named_modules() if isinstance(module, _QUANTIZED_LAYERS)}

    def cast(name: str, array: mx.array) -> mx.array:
        layer, _, part = name.rpartition(".")
        keep = (layer in quantized and part != "bias") or not mx.issubdtype(array.dtype, mx.floating)
        return array if keep else array.astype(dtype)

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantize(base: BaseModel, quantize: schema.QuantizeConfig) -> None:
    from mlx_lm.utils import quantize_model

    if _is_quantized(base.model):
        raise ModelError(f"model.quantize.bits={quantize.bits}: {base.model_path} is quantized already.")
    base.model, base.config = quantize_model(base.model, base.config, quantize.group_size, quantize.bits)
