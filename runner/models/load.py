"""Load a base model from `model.path`: a built-in name, a GGUF file, a model folder or a hub id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.common.errors import ModelError, RunnerError, did_you_mean
from runner.config import schema
from runner.data.lazy_tokenizer import LazyTokenizer, resolve_tokenizer
from runner.models import fetch, hub, quantization, transformers5_config
from runner.models.device import on_cpu
from runner.models.identity import content_hash, weights_fingerprint
from runner.models.precision import precision_of, resolve_auto
from runner.models.preflight import check_model_folder

ROUNDED_BY_EARLIER_VERSIONS = (
    "Earlier versions rounded the weights of a quantized base model to 16 bits while dequantizing it, and this one "
    "does not: what they trained on such a base needs the version that it was trained with."
)
_EMBEDDINGS_ROUNDED_BY_EARLIER_VERSIONS = (
    "Earlier versions rounded the embeddings of a base model that stays quantized to the 16 bits of its scales, "
    "whatever model.dtype was, and this one does not."
)
_WINDOW_IGNORED = ("mistral", "ministral3", "mixtral", "phi3", "phimoe", "starcoder2")
"""Model types with an attention window in every layer, which mlx-lm does not compute."""
_WINDOW_OPTIONAL = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Model types whose window is not computed by mlx-lm either, and not by transformers unless `use_sliding_window`."""
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
"""By the value of model.dtype; native has none: nothing is cast."""


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
    precision: dict[str, str] = field(default_factory=dict)
    """The dtype and dequantize that it was loaded with, neither of them `auto`: see `precision.precision_of`."""
    content_hash: str = ""
    """Identity of everything that determines the output, used as a cache key: see `identity.content_hash`."""
    folder: Path | None = None
    """The folder that the model was read from; None for a GGUF file and a generated model."""
    differs_from_earlier_versions: list[str] = field(default_factory=list)
    """A sentence for each reason why the model is not the one that earlier versions loaded from the same files."""
    expanded: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Bits and mode of the layers of a folder that are quantized there and were dequantized while loading."""
    has_values: bool = True
    """Whether the weights are there; else they are shapes: see `shapes.load_shapes`."""
    carried_over: dict[str, Any] = field(default_factory=dict)
    """Keys of `config` that stock mlx-lm does not find in the folder's config.json."""
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
    config = resolve_auto(config)
    dequantize, dtype = conversion(config)
    try:
        base, code_sha256 = _read(config, dequantize, dtype)
        if config.trust_remote_code:
            base.notes.append(f"model.trust_remote_code=true: code that came with {config.path} may run")
        convert_weights(base, config)
        mx.eval(base.model.parameters())
        if not hasattr(base.model, "_no_grad"):  # its class does not call the constructor of nn.Module
            raise ModelError(
                f"model.path={config.path}: model_type '{base.config.get('model_type')}' is not supported, because "
                f"mlx-lm {version('mlx-lm')} cannot freeze a model of that class, which training an adapter and "
                "loading it need."
            )
        base.model.freeze()
        base.model.eval()
    except (RunnerError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # mlx-lm, transformers and the hub's library raise all kinds of errors
        raise hub.load_error(config.path, error, "model") from error
    if on_cpu() and quantization.needs_gpu(base.model):
        raise ModelError(
            f"model.path={config.path}: MLX multiplies NVFP4 weights that have a global scale on a GPU only. "
            "Expand them: model.dequantize=auto (runner export: --dequantize); a run that began on a GPU stays there."
        )
    base.precision = precision_of(config)
    base.fingerprint = weights_fingerprint(base.model, base.carried_over)
    base.content_hash = content_hash(base.model, base.config, base.fingerprint, code_sha256)
    return base


def conversion(config: schema.ModelConfig) -> tuple[bool, mx.Dtype | None]:
    """Return whether a quantized base is dequantized, and the dtype that weights are cast to; None: their own."""
    config = resolve_auto(config)
    return config.dequantize == "always", DTYPES.get(config.dtype)


def convert_weights(base: BaseModel, config: schema.ModelConfig, *, evaluate: bool = True) -> None:
    """Dequantize, cast and quantize the weights of `base` as configured; without `evaluate` nothing is computed yet.

    Raises:
        ModelError: a layer cannot be dequantized, or the model not be quantized.
    """
    dequantize, dtype = conversion(config)
    if dequantize and quantization.is_quantized(base.model):
        remove_quantization(base, dtype, evaluate=evaluate)
        reason = "on the CPU only float32 products are fast" if on_cpu() else "model.dequantize=always"
        base.notes.append(f"the quantized base is dequantized: {reason}")
    if dtype is not None and _cast(base.model, dtype):
        base.differs_from_earlier_versions.append(_EMBEDDINGS_ROUNDED_BY_EARLIER_VERSIONS)
    if config.quantize.bits is not None:
        _quantize(base, config.quantize)
    elif config.dtype == "native" and on_cpu() and _is_slow_on_the_cpu(base.model):
        base.notes.append("the base model keeps its own data types, whose products are slow on the CPU")


def remove_quantization(base: BaseModel, dtype: mx.Dtype | None = None, *, evaluate: bool = True) -> None:
    """Dequantize every quantized layer of `base` to `dtype` and remove the quantization from its config.

    Raises:
        ModelError: a layer is of a kind that cannot be dequantized.
    """
    base.expanded = {name: (q.bits, q.mode) for name, q in quantization.quantized_layers(base.model).items()}
    if remaining := quantization.expand_layers(base.model, dtype, evaluate=evaluate):
        raise ModelError(
            f"{base.model_path}: {remaining[0]} ({len(remaining)} in all) is quantized in a way of its architecture's "
            "own and cannot be dequantized. Keep it: model.dequantize=never."
        )
    quantization.remove_from_config(base.config)
    base.differs_from_earlier_versions.append(ROUNDED_BY_EARLIER_VERSIONS)


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
    return read_folder(hub.find_model_folder(path, config.revision), config)


def _read_gguf(file: Path, config: schema.ModelConfig, dequantize: bool, dtype: mx.Dtype | None) -> BaseModel:
    from runner.models.gguf.load import load_gguf

    gguf = load_gguf(file, keep_quantized=not dequantize, dtype=dtype)
    return BaseModel(gguf.model, gguf.tokenizer, gguf.config, config.path, notes=gguf.notes)


def read_folder(folder: Path, config: schema.ModelConfig) -> tuple[BaseModel, str]:
    """Return the model of a folder with weights that are not read yet, and the SHA-256 of code that came with it."""
    from mlx_lm.utils import load_config, load_model, load_tokenizer

    check_model_folder(folder)
    # Lazily: each layer is read when it is converted, and what it was converted from is freed.
    carried = transformers5_config.carried_over(load_config(folder), config.path)
    model, model_config = load_model(
        folder, lazy=True, model_config=carried, trust_remote_code=config.trust_remote_code
    )
    quantization.refuse_quantized_activations(model_config, config.path)
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
            raise hub.load_error(config.path, error, "tokenizer") from error

    # Code that comes with a model may read other files, so the folder does not identify the tokenizer then.
    tokenizer = LazyTokenizer(read_tokenizer, None if config.trust_remote_code else folder)
    code_file = model_config.get("model_file")  # mlx-lm has run it to build the architecture
    code_sha256 = hashlib.sha256((folder / code_file).read_bytes()).hexdigest() if code_file else ""
    base = BaseModel(model, tokenizer, model_config, config.path, folder=folder, carried_over=carried)
    if carried:
        base.notes.append(transformers5_config.carried_over_note(config.path))
        base.differs_from_earlier_versions.append(transformers5_config.OLD_RUNS_MISREAD)
    base.notes += _window_notes(model_config)
    return base, code_sha256


def _window_notes(config: dict[str, Any]) -> list[str]:
    """Return what tells that the model attends over the whole row, where its authors restricted it to a window."""
    model_type, window = config.get("model_type"), config.get("sliding_window")
    ignored = model_type in _WINDOW_IGNORED and not config.get("layer_types")  # which some of them do read
    optional = model_type in _WINDOW_OPTIONAL and config.get("use_sliding_window")
    longest = config.get("max_position_embeddings")
    if not (ignored or optional) or type(window) is not int or (type(longest) is int and longest <= window):
        return []
    return [
        f"the model's attention window of {window:,} tokens is not computed by mlx-lm {version('mlx-lm')}: "
        "longer rows are attended to as a whole"
    ]


def _cast(model: nn.Module, dtype: mx.Dtype) -> bool:
    """Cast floating-point parameters to `dtype`, except those of quantized layers and those that must keep their own.

    The latter are named by `cast_predicate` of mlx-lm's models, such as the biases of a router. A quantized product
    takes the dtype of its activations, but a quantized embedding that of its affine scales, which are cast for that.

    Returns:
        whether the scales of an embedding had another dtype.
    """
    quantized = quantization.quantized_layers(model)
    embeddings = {
        name for name, layer in quantized.items() if isinstance(layer, nn.QuantizedEmbedding) and layer.mode == "affine"
    }
    may_cast = getattr(model, "cast_predicate", lambda name: True)
    kept = quantized.keys() - embeddings
    before = [quantized[name].scales.dtype for name in embeddings]

    def cast(name: str, array: mx.array) -> mx.array:
        layer, _, part = name.rpartition(".")
        keep = (layer in kept and part != "bias") or not mx.issubdtype(array.dtype, mx.floating)
        return array if keep or not may_cast(name) else array.astype(dtype)

    model.update(tree_map_with_path(cast, model.parameters()))
    return any(found != dtype for found in before)


def _is_slow_on_the_cpu(model: nn.Module) -> bool:
    return quantization.is_quantized(model) or quantization.prevailing_dtype(model) != mx.float32


def _quantize(base: BaseModel, quantize: schema.QuantizeConfig) -> None:
    from mlx_lm.utils import quantize_model

    if quantization.is_quantized(base.model):
        raise ModelError(
            f"model.quantize.bits={quantize.bits}: {base.model_path} is quantized already. To quantize it "
            "anew: model.dequantize=always."
        )
    base.model, base.config = quantize_model(
        base.model, base.config, quantize.group_size, quantize.bits, mode=quantize.mode
    )
    if not quantization.is_quantized(base.model):
        raise ModelError(
            f"model.quantize.bits={quantize.bits}: no layer of {base.model_path} can be quantized in groups of "
            f"{quantize.group_size}, because no width is a multiple of it."
        )
    if on_cpu():
        base.notes.append("model.quantize.bits: quantized products are slow on the CPU backend")
