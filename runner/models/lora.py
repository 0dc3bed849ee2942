"""LoRA adapters of a base model: adding and removing the layers, their config, and weights from other tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from runner.checkpoints.safetensors_file import read_header
from runner.common import safe_json
from runner.common.errors import ModelError, RunnerError, did_you_mean
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.common.text import shorten
from runner.config import schema, validation
from runner.models import npz
from runner.models.arrays import parse_arrays
from runner.models.dropout import DropoutKeys, KeyedDropout
from runner.models.load import BaseModel
from runner.models.precision import ADAPTER_FIELD

_MAX_CONFIG_BYTES = 1 << 20
_MAX_CONFIG_VALUES = 10_000
Params = dict[str, mx.array]
"""Trainable arrays by their dotted path in the model."""


class AdaptedModel:
    """A base model with an adapter; `remove` restores the base."""

    def __init__(self, base: BaseModel, lora: schema.LoraConfig, seed: int, model_path: str | None = None) -> None:
        """Add LoRA layers to the last `lora.num_layers` blocks, or to all if there are fewer.

        A is a function of `seed` alone, B is zero. `model_path` is what adapter_config.json names as the base model, by
        default the path that it was loaded from.

        Raises:
            ModelError: `lora.keys` names a layer that no block has.
        """
        self.base = base
        self.model_path = model_path or base.model_path
        self.model = base.model
        self.dropout = DropoutKeys()
        depth = len(self.model.layers)
        self.num_layers = depth if lora.num_layers == -1 else min(lora.num_layers, depth)
        self.keys = keys = _checked_keys(self.model, lora.keys)
        scale = validation.lora_scale(lora)
        self.lora_parameters: dict[str, Any] = {
            "rank": lora.rank,
            "scale": scale,
            "dropout": lora.dropout,
            "keys": keys,
        }
        # mlx-lm draws the factors from MLX's global random state, which nothing else uses.
        mx.random.seed(seed)
        linear_to_lora_layers(self.model, self.num_layers, {**self.lora_parameters, "keys": set(keys)})
        if not tree_flatten(self.model.trainable_parameters()):
            raise ModelError(
                f"model.path={self.model_path}: no layer of its last {self.num_layers} blocks can have an adapter: "
                "mlx-lm adapts linear, embedding and expert layers only."
            )
        for _, module in self._adapters():
            if lora.dropout > 0:
                module.dropout = KeyedDropout(lora.dropout, self.dropout)
        mx.eval(self.model.trainable_parameters())
        self._dtypes = {name: _dtype_of(module) for name, module in self._adapters()} if lora.dtype == "model" else {}

    def place(self, params: Params) -> None:
        """Set the model's adapter to `params`, cast to the dtype it computes in; gradients pass through the cast."""
        if self._dtypes:
            params = {name: array.astype(self._dtypes[name.rpartition(".")[0]]) for name, array in params.items()}
        self.model.update(tree_unflatten(list(params.items())))

    def params(self) -> Params:
        """Return the current trainable arrays."""
        return dict(sorted(tree_flatten(self.model.trainable_parameters())))

    def probe_params(self) -> Params:
        """Return weights for comparing gradients: those of the adapter, with a small random B.

        B starts at zero, where the gradient of A is zero as well. A large one would make the model's activations so
        wild that rounding alone exceeds a tolerance.
        """
        params = self.params()
        spread = 0.02 / max(1.0, self.lora_parameters["scale"])
        keys = mx.random.split(mx.random.key(0), max(1, len(params)))
        return {
            name: mx.random.normal(array.shape, scale=spread, key=key) if name.endswith("lora_b") else array
            for (name, array), key in zip(params.items(), keys, strict=False)
        }

    def adapter_config(self) -> dict[str, Any]:
        """Return the content of adapter_config.json as mlx-lm reads it."""
        return {
            "model": self.model_path,
            "fine_tune_type": "lora",
            "num_layers": self.num_layers,
            "lora_parameters": self.lora_parameters,
            "base_fingerprint": self.base.fingerprint,
            ADAPTER_FIELD: self.base.precision,
        }

    def remove(self) -> None:
        """Remove the adapter and restore the base model's own layers."""
        base_layers = [(name, _base_of(module)) for name, module in self._adapters()]
        self.model.update_modules(tree_unflatten(base_layers))
        self.model.freeze()
        self.model.eval()

    def explain(self, error: Exception) -> ModelError:
        """Return why the model with its adapter cannot compute, where `error` is what it raised."""
        adapters = self._adapters()
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        self.model.update_modules(tree_unflatten([(name, _base_of(module)) for name, module in adapters]))
        if _fails(self.model):
            return ModelError(f"model.path={self.model_path}: mlx-lm cannot compute this model here: {reason}.")
        read = []
        for key in self.keys:
            own = [(name, module) for name, module in adapters if name.endswith(f".{key}")]
            self.model.update_modules(tree_unflatten(own))
            if _fails(self.model):
                read.append(key)
            self.model.update_modules(tree_unflatten([(name, _base_of(module)) for name, module in own]))
        self.model.update_modules(tree_unflatten(adapters))
        if not read:
            return ModelError(f"model.path={self.model_path}: mlx-lm cannot train this model: {reason}.")
        others = ",".join(key for key in self.keys if key not in read)
        return ModelError(
            f"lora.keys: the model reads the weights of {', '.join(read)} itself, so there can be no adapter on it. "
            f"Leave it out: 'lora.keys=[{others}]'"
        )

    def _adapters(self) -> list[tuple[str, nn.Module]]:
        return [(name, m) for name, m in self.model.named_modules() if hasattr(m, "lora_a")]


def _base_of(module: nn.Module) -> nn.Module:
    """Return the base model's layer inside a layer with an adapter."""
    return module.embedding if "embedding" in module else module.linear


def _fails(model: nn.Module) -> bool:
    """Return whether `model` cannot compute four tokens in training mode, in which no model uses what it cached."""
    training = model.training
    model.train()
    try:
        mx.eval(model(mx.array([[1, 2, 1, 0]])))
    except Exception:
        return True
    finally:
        model.train(training)
    return False


def _dtype_of(module: nn.Module) -> mx.Dtype:
    """Return the dtype that the layer with an adapter computes in."""
    layer = _base_of(module)
    return layer.scales.dtype if "scales" in layer else layer.weight.dtype


def trainable_share(adapted: AdaptedModel) -> tuple[int, int]:
    """Return the numbers of trainable parameters and of all parameters (quantized weights counted unpacked)."""
    from mlx_lm.utils import get_total_parameters

    return sum(a.size for a in adapted.params().values()), get_total_parameters(adapted.model)


def read_weights(path: Path, fitting: Params | None = None) -> dict[str, mx.array]:
    """Return adapter weights from an mlx-examples .npz, an mlx-lm .safetensors, or a folder with adapters.safetensors.

    Names and shapes are compared with those of `fitting`, if given, before any weights are read.

    Raises:
        ModelError: missing, of another kind, unreadable, or not fitting; a pickle inside an .npz is never loaded.
        CheckpointError: an invalid .safetensors file.
    """
    file = _weights_file(path)
    if file.suffix == ".npz":
        return _read_npz(file, path, fitting)
    spans, _ = read_header(file)
    if fitting is not None:
        _require_fit(fitting, {name: span.shape for name, span in spans.items()}, str(path))
    return parse_arrays(file.read_bytes(), source=str(file))


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        for file in (path / ADAPTERS, path / "adapters" / ADAPTERS, path / "adapters.npz"):
            if file.is_file():
                return file
        raise ModelError(f"adapter={path}: no {ADAPTERS} in this folder.")
    if not path.is_file():
        raise ModelError(f"adapter={path}: there is no such file or folder.")
    if path.suffix not in (".npz", ".safetensors"):
        raise ModelError(f"adapter={path}: expected .npz, .safetensors or an adapter folder, not '{path.suffix}'.")
    return path


def _read_npz(file: Path, path: Path, fitting: Params | None) -> dict[str, mx.array]:
    try:
        with npz.open_npz(file) as archive:
            if fitting is not None:
                _require_fit(fitting, dict.fromkeys(archive.names), str(path))
                _require_fit(fitting, archive.shapes(), str(path))
            return {name: mx.array(array) for name, array in archive.arrays()}
    except ModelError:
        raise
    except Exception as error:  # zip, zlib, numpy and value errors alike: not a plain .npz
        raise ModelError(f"adapter={path} cannot be read: {shorten(' '.join(str(error).split()))}") from error


def warm_start(params: Params, weights: dict[str, mx.array], where: str) -> Params:
    """Return `weights` in the dtypes of `params`, whose names and shapes they must have.

    Raises:
        ModelError: names arrays that are missing, unknown, of another shape or not finite, and what to set.
    """
    _require_fit(params, {name: array.shape for name, array in weights.items()}, where)
    for name in sorted(params):
        if not mx.all(mx.isfinite(weights[name])).item():
            raise _unfit(where, [f"{name} has NaN or Inf"])
    return {name: weights[name].astype(params[name].dtype) for name in params}


def _require_fit(params: Params, shapes: Mapping[str, tuple[int, ...] | None], where: str) -> None:
    """Raise ModelError unless names and shapes (None: not known yet) are those of `params`."""
    missing, unknown = sorted(set(params) - set(shapes)), sorted(set(shapes) - set(params))
    problems = [f"{len(missing)} arrays are missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(unknown)} arrays are unknown, such as {shorten(unknown[0])}"] if unknown else []
    for name in sorted(set(params) & set(shapes)):
        if shapes[name] is not None and params[name].shape != shapes[name]:
            problems.append(f"{name} has shape {shorten(shapes[name])}, expected {params[name].shape}")
            break
    if problems:
        raise _unfit(where, problems)


def _unfit(where: str, problems: list[str]) -> ModelError:
    return ModelError(
        f"adapter={where} does not fit this run: {'; '.join(problems)}. "
        f"Set lora.rank, lora.num_layers and lora.keys to what it was trained with{_trained_with(where)}."
    )


def _trained_with(where: str) -> str:
    """Return the shape of the adapter in parentheses, if its adapter_config.json can be read."""
    path = Path(where)
    file = (path if path.is_dir() else path.parent) / ADAPTER_CONFIG
    try:
        config = safe_json.parse(FileSystem().read_file(file, _MAX_CONFIG_BYTES), max_values=_MAX_CONFIG_VALUES)
        lora = config["lora_parameters"]
        shape = f"rank {lora['rank']}, num_layers {config['num_layers']}, keys {lora.get('keys')}"
    except (RunnerError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f" ({shorten(shape, 1000)})"


def _checked_keys(model: nn.Module, keys: list[str] | None) -> list[str]:
    """Return the names of a block's layers that can have an adapter, or those of them that `keys` names.

    A key is a layer's name, or the end of the names of one or several, as in PEFT's `target_modules`.
    """
    known: set[str] = set()
    for block in model.layers:
        for name, module in block.named_modules():
            if hasattr(module, "to_lora") or _adaptable(module):
                known.add(name)
    if keys is None:
        return sorted(known)
    chosen: set[str] = set()
    for key in keys:
        matches = {key} & known or {name for name in known if name.endswith(f".{key}")}
        if not matches:
            raise ModelError(
                f"lora.keys: no block has '{key}'; it has {', '.join(sorted(known))}.{did_you_mean(key, known)}"
            )
        chosen |= matches
    return sorted(chosen)


def _adaptable(module: nn.Module) -> bool:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    quantized = (nn.QuantizedLinear, QuantizedSwitchLinear, nn.QuantizedEmbedding)
    return isinstance(module, (nn.Linear, SwitchLinear, nn.Embedding, *quantized))
