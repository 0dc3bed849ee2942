"""Loading a base model from wherever `model.path` points: built in, a .gguf file, a folder, or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.common.errors import ModelError, RunnerError, did_you_mean
from runner.config import schema
from runner.data.lazy_tokenizer import LazyTokenizer, resolve_tokenizer
from runner.models.preflight import check_model_folder

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
BUILTIN = ("tiny", "smollm2_135m")


@dataclass
class BaseModel:
    """A loaded, frozen base model."""

    model: nn.Module
    tokens: TokenizerWrapper | LazyTokenizer
    """Its tokenizer, or what will load it: see `tokenizer`."""
    config: dict[str, Any]
    """As in the hub's config.json."""
    source: str
    """What adapter_config.json names as the model."""
    fingerprint: str
    """Identity of the weights: see `fingerprint`."""
    contents: str = ""
    """Identity of all that the model computes: see `contents`."""
    notes: list[str] = field(default_factory=list)
    """Lines worth saying."""

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer; loaded now if it was not needed before. Raises ModelError where it cannot be."""
        return resolve_tokenizer(self.tokens)


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here: there only float32 products are fast."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def load_base_model(settings: schema.ModelConfig) -> BaseModel:
    """Load the base model and its config; weights are frozen and in memory. A folder's tokenizer is loaded when needed.

    Raises:
        ModelError: there is no such model, or it is not supported; names what.
    """
    notes: list[str] = []
    if settings.trust_remote_code:
        notes.append(f"model.trust_remote_code=true: code that came with {settings.path} may run")
    expand = settings.dequantize == "always" or (settings.dequantize == "auto" and on_cpu())
    dtype = _DTYPES.get(settings.dtype) or (mx.float32 if on_cpu() else None)
    try:
        model, tokens, about, code = _read(settings, expand, dtype)
    except RunnerError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # mlx-lm, transformers and the hub raise all kinds for a model they cannot load
        raise _cannot(settings, error) from error
    if expand and _is_quantized(model):
        from mlx_lm.utils import dequantize_model

        model = dequantize_model(model)
        about.pop("quantization", None)
        about.pop("quantization_config", None)
        notes.append("the quantized base is expanded: on the CPU only float32 products are fast")
    if dtype is not None:
        _cast(model, dtype)
    if settings.quantize.bits is not None:
        model, about = _quantized(model, about, settings)
        if on_cpu():
            notes.append("model.quantize.bits: quantized products are slow on the CPU backend")
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    sample = fingerprint(model)
    return BaseModel(model, tokens, about, settings.path, sample, contents_hash(model, about, sample, code), notes)


def contents_hash(model: nn.Module, about: Mapping[str, Any], sample: str, code: str = "") -> str:
    """SHA-256 over the config, the `code` that came with the model, the `sample` of `fingerprint` and, for each line of
    each weight, a sum over its bits: by it a cache knows what it was computed from.

    Unlike a sample alone, the sums notice a single weight that was changed, and lines that changed places; unlike a
    hash of all, they are made as fast as memory is read. The bits are summed as whole numbers of 64 bits: in 32,
    doubling every weight of a line, which adds 2^23 each time, would add up to nothing.
    """
    sums = {}
    for name, array in sorted(tree_flatten(model.parameters())):
        lines = array.reshape(-1, array.shape[-1] if array.ndim else 1)
        whole = lines.shape[-1] * lines.dtype.size % 8 == 0
        words = lines.view(mx.uint64) if whole else lines.view(mx.uint8).astype(mx.uint64)
        sums[f"{name} {array.shape} {array.dtype}"] = words.sum(axis=-1)
    mx.eval(list(sums.values()))
    digest = hashlib.sha256(
        json.dumps([sample, about, *([code] if code else [])], sort_keys=True, default=str).encode()
    )
    for head, found in sums.items():
        digest.update(head.encode())
        digest.update(np.asarray(found).tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, shape, dtype and up to 1,024 evenly spaced elements.

    A sample, so that 8B models are identified in well under a second; another fine-tune of the same shapes
    differs in nearly all elements, hence in the sample.
    """
    digest = hashlib.sha256()
    samples = []
    for name, array in sorted(tree_flatten(model.parameters())):
        flat = array.reshape(-1)
        stride = max(1, flat.size // 1024)
        sample = flat[::stride][:1024]
        if mx.issubdtype(sample.dtype, mx.floating):
            sample = sample.astype(mx.float32)
        samples.append((f"{name} {array.shape} {array.dtype}", sample))
    mx.eval([sample for _, sample in samples])
    for head, sample in samples:
        digest.update(head.encode())
        digest.update(np.asarray(sample).tobytes())
    return digest.hexdigest()


def _read(
    settings: schema.ModelConfig, expand: bool, dtype: mx.Dtype | None
) -> tuple[nn.Module, TokenizerWrapper | LazyTokenizer, dict[str, Any], str]:
    path = settings.path
    if path == "builtin:tiny":
        from runner.models import tiny

        return tiny.model(), tiny.tokenizer(), dict(tiny.CONFIG), ""
    if path.startswith("builtin:"):
        name = path.removeprefix("builtin:")
        if name not in BUILTIN:
            raise ModelError(f"model.path={path} is not built in: {', '.join(BUILTIN)}.{did_you_mean(name, BUILTIN)}")
        from runner.models.fetch import fetch

        path = str(fetch(name))
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ModelError(f"model.path={path}: there is no such file.")
        from runner.models.gguf.load import read

        gguf = read(Path(path), keep_quantized=not expand, dtype=dtype)
        return gguf.model, gguf.tokenizer, gguf.config, ""
    _expect_model(path)
    from mlx_lm.utils import _download, load_model, load_tokenizer

    folder = _download(path, revision=settings.revision)
    check_model_folder(folder)
    model, about = load_model(folder, trust_remote_code=settings.trust_remote_code)

    def load_tokens() -> TokenizerWrapper:
        if not Path(folder).is_dir():
            raise ModelError(f"model.path={path}: its folder {folder} is gone since the model was loaded.")
        extra = {"trust_remote_code": settings.trust_remote_code}
        try:
            return load_tokenizer(folder, extra, eos_token_ids=about.get("eos_token_id"))
        except (RunnerError, MemoryError):
            raise
        except Exception as error:
            raise _cannot(settings, error) from error

    # Code that comes with a model may read anything.
    tokens = LazyTokenizer(load_tokens, None if settings.trust_remote_code else Path(folder))
    own = about.get("model_file")  # mlx-lm has run it as the model's architecture
    code = hashlib.sha256((Path(folder) / own).read_bytes()).hexdigest() if own else ""
    return model, tokens, about, code


def _expect_model(path: str) -> None:
    """Say early what is wrong with a path; a hub id is left to the hub's own library."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path={path} is not a model folder: it has no config.json.")
        if not list(folder.glob("model*.safetensors")):
            raise ModelError(f"model.path={path} has no model*.safetensors.")
    elif folder.is_file():
        raise ModelError(f"model.path={path} is a file: a model is a folder, a .gguf file or a hub id.")
    elif path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ModelError(f"model.path={path}: there is no such folder or file (a hub id looks like ORGANISATION/NAME).")


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for _, m in model.named_modules())


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast floating parameters, except the scales of quantized layers, which keep what they were packed with."""
    packed = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    )

    def cast(name: str, array: mx.array) -> mx.array:
        quantized = name.rpartition(".")[0] in packed and not name.endswith(".bias")
        return array if quantized or not mx.issubdtype(array.dtype, mx.floating) else array.astype(dtype)

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantized(
    model: nn.Module, about: dict[str, Any], settings: schema.ModelConfig
) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import quantize_model

    if _is_quantized(model):
        raise ModelError(f"model.quantize.bits={settings.quantize.bits}: {settings.path} is quantized already.")
    return quantize_model(model, about, settings.quantize.group_size, settings.quantize.bits)


def _cannot(settings: schema.ModelConfig, error: Exception) -> ModelError:
    return ModelError(f"model.path={settings.path} cannot be loaded: {_reason(error)}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text.replace("Pass trust_remote_code=True", "Type model.trust_remote_code=true")
    if type(error).__name__ in (
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectError",
        "ConnectionError",
    ):
        return (
            "it is neither a local folder nor in the hub's cache, and the hub cannot be reached. "
            "Check the name and the network."
        )
    if type(error).__name__ in ("RepositoryNotFoundError", "GatedRepoError"):
        return "the hub has no such model, or it needs a login (hf auth login). Check the name."
    return (text[:400] or type(error).__name__).rstrip(".") + "."
