"""Adapters of a base model: adding and removing their layers, and their config.

`lora.type` lora and dora put layers with factors of their own into the model; full trains arrays of the model itself,
as does `lora.modules_to_save`. Every trained array is float32, whatever the base has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from runner.checkpoints.safetensors_file import Tensor
from runner.common.errors import ModelError
from runner.config import schema, validation
from runner.models import pissa
from runner.models.adapter_layers import DoraEmbedding, DoraLinear, PissaLinear
from runner.models.adapter_targets import Targets, adapter_for, find_targets
from runner.models.dropout import DropoutKeys, KeyedDropout
from runner.models.load import BaseModel
from runner.models.precision import ADAPTER_FIELD

Params = dict[str, mx.array]
"""Trainable arrays by their dotted path in the model."""
_AFTER_BLOCKS = ("lm_head", "norm")
"""Last names of modules outside the blocks that are computed after them; any other may be computed before them."""


class AdaptedModel:
    """A base model with an adapter; `remove` restores the base."""

    def __init__(self, base: BaseModel, lora: schema.LoraConfig, seed: int, model_path: str | None = None) -> None:
        """Add the adapter that `lora` describes, at its start.

        A is a function of `seed` alone, B is zero; magnitudes and whole modules start as the base has them. (PiSSA
        begins with `start_pissa`.) `model_path` is what adapter_config.json names as the base model, by default the
        path that it was loaded from.

        Raises:
            ModelError: a key names a layer that the model does not have, or one that cannot be trained this way.
        """
        self.base, self.lora = base, lora
        self.model_path = model_path or base.model_path
        self.model = base.model
        self.dropout = DropoutKeys()
        self.depth = len(self.model.layers)
        self.num_layers = self.depth if lora.num_layers == -1 else min(lora.num_layers, self.depth)
        self.targets: Targets = find_targets(self.model, lora, self.num_layers, self.model_path)
        # mlx-lm's layers draw their factors from MLX's global random state, which nothing else uses.
        mx.random.seed(seed)
        layers = []
        for target in self.targets.adapted:
            scale = validation.lora_scale(lora, target.rank)
            layers.append((target.path, adapter_for(target, lora, scale, has_values=base.has_values)))
        self.model.update_modules(tree_unflatten(layers))
        self._originals = self._train_whole_modules()
        for _, module in self._adapters():
            if lora.dropout > 0:
                module.dropout = KeyedDropout(lora.dropout, self.dropout)
        mx.eval(self.model.trainable_parameters())
        self._dtypes = self._computed_dtypes() if lora.dtype == "model" else {}

    @property
    def frozen_blocks(self) -> int:
        """Number of blocks below everything that is trained."""
        if any(path.rpartition(".")[2] not in _AFTER_BLOCKS for path in self.targets.outside):
            return 0
        return min(self.targets.blocks, default=self.depth)

    @property
    def original_bytes(self) -> int:
        """Bytes of the base's own arrays that are kept beside those trained in their place."""
        return sum(array.nbytes for array in self._originals.values())

    @property
    def start_bytes(self) -> int:
        """Bytes of what checkpoints hold beside the trained arrays: the start of PiSSA."""
        return sum(array.nbytes for _, module in self._pissa_layers() for array in module.exact_start)

    @property
    def trains_head(self) -> bool:
        """Whether the head, or an embedding that may be the head as well, is trained."""
        return bool(self._head_paths())

    @property
    def head_params(self) -> tuple[str, ...]:
        """Names of the trained arrays that the head may read."""
        paths = tuple(f"{path}." for path in self._head_paths())
        return tuple(name for name in self.params() if name.startswith(paths))

    @property
    def is_tied(self) -> bool:
        """Whether the model has no head of its own beside its embedding."""
        return not any(name.rpartition(".")[2] == "lm_head" for name, _ in self.model.named_modules())

    def place(self, params: Params) -> None:
        """Set the model's adapter to `params`, cast to the dtype it computes in; gradients pass through the cast."""
        if self._dtypes:
            params = {name: array.astype(self._dtypes.get(name, array.dtype)) for name, array in params.items()}
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
        spread = 0.02 / max(1.0, validation.lora_scale(self.lora))
        keys = mx.random.split(mx.random.key(0), max(1, len(params)))
        return {
            name: mx.random.normal(array.shape, scale=spread, key=key) if name.endswith("lora_b") else array
            for (name, array), key in zip(params.items(), keys, strict=False)
        }

    def without_effect(self, params: Params) -> Params:
        """Return an adapter like `params` that does nothing: B is zero, or the start of PiSSA, all else as the base
        has it."""
        base = {name: mx.zeros_like(array) for name, array in params.items() if name.endswith("lora_b")}
        base |= {name: array.astype(mx.float32) for name, array in self._originals.items()}
        for name, module in self._adapters():
            if isinstance(module, (DoraLinear, DoraEmbedding)):
                base[f"{name}.m"] = module.base_magnitudes
        for name, module in self._pissa_layers():
            base[f"{name}.lora_a"], base[f"{name}.lora_b"] = module.exact_start
        return {name: base.get(name, array) for name, array in params.items()}

    def start_pissa(self, params: Params) -> Params:
        """Return `params` with the factors that PiSSA starts from, where `lora.init` asks for it."""
        started = dict(params)
        for name, module in self._pissa_layers():
            pissa.set_start(module, self._dtypes.get(f"{name}.lora_a", mx.float32))
            started |= {f"{name}.lora_a": module.lora_a, f"{name}.lora_b": module.lora_b}
        mx.eval(started)
        return started

    def to_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return trained arrays as a checkpoint holds them: beside PiSSA's factors their start, as a LoRA of twice the
        rank."""
        stored = dict(tensors)
        for name, module in self._pissa_layers():
            stored |= pissa.with_start(name, module, tensors)
        return stored

    def from_stored(self, params: Params) -> Params:
        """Return the trained arrays of those that a checkpoint holds; the start of PiSSA is set to the stored one.

        Arrays of other names or shapes are returned as they are.
        """
        trained = dict(params)
        for name, module in self._pissa_layers():
            trained |= pissa.split_start(name, module, params, self._dtypes.get(f"{name}.lora_a", mx.float32))
        return trained

    def adapter_config(self) -> dict[str, Any]:
        """Return the content of adapter_config.json as mlx-lm reads it."""
        lora, whole = self.lora, self.targets.whole
        num_layers, keys = self.targets.stock_keys(self.num_layers)
        parameters = {
            "rank": lora.rank * (2 if lora.init == "pissa" else 1),
            "scale": validation.lora_scale(lora),
            "dropout": lora.dropout,
            "keys": keys,
        }
        return {
            "model": self.model_path,
            "fine_tune_type": lora.type,
            "num_layers": num_layers,
            "lora_parameters": None if lora.type == "full" else parameters,
            **({"rank_pattern": lora.rank_pattern} if lora.rank_pattern else {}),
            **({"modules_to_save": sorted(whole)} if whole and lora.type != "full" else {}),
            "base_fingerprint": self.base.fingerprint,
            ADAPTER_FIELD: self.base.precision,
        }

    def round_whole_modules(self) -> None:
        """Cast the arrays of whole modules to the dtypes that the base has."""
        arrays = dict(tree_flatten(self.model.parameters()))
        self.model.update(tree_unflatten([(n, arrays[n].astype(base.dtype)) for n, base in self._originals.items()]))

    def remove(self) -> None:
        """Remove the adapter and restore the base model's own layers and weights."""
        base_layers = [(name, _base_of(module)) for name, module in self._adapters()]
        self.model.update_modules(tree_unflatten(base_layers))
        self.model.update(tree_unflatten(list(self._originals.items())))
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
        keys = self.targets.keys
        for key in keys:
            own = [(name, module) for name, module in adapters if name.endswith(f".{key}") or name == key]
            self.model.update_modules(tree_unflatten(own))
            if _fails(self.model):
                read.append(key)
            self.model.update_modules(tree_unflatten([(name, _base_of(module)) for name, module in own]))
        self.model.update_modules(tree_unflatten(adapters))
        if not read:
            return ModelError(f"model.path={self.model_path}: mlx-lm cannot train this model: {reason}.")
        others = ",".join(key for key in keys if key not in read)
        return ModelError(
            f"lora.keys: the model reads the weights of {', '.join(read)} itself, so there can be no adapter on it. "
            f"Leave it out: 'lora.keys=[{others}]'"
        )

    def _head_paths(self) -> list[str]:
        below = {"norm"} if self.is_tied else {"norm", "embed_tokens"}
        return [path for path in self.targets.outside if path.rpartition(".")[2] not in below]

    def _train_whole_modules(self) -> Params:
        """Make the arrays of whole modules trainable, in float32, and return them as the base has them."""
        originals: Params = {}
        for path, module in self.targets.whole.items():
            module.unfreeze()
            for part in module.modules():
                arrays = {k: v for k, v in part.items() if isinstance(v, mx.array)}
                other = [key for key, array in arrays.items() if not mx.issubdtype(array.dtype, mx.floating)]
                # The bias that balances experts has no gradient: weight decay alone would change it.
                other += [key for key in arrays if key.endswith("correction_bias")]
                part.freeze(recurse=False, keys=other)
            originals |= {f"{path}.{name}": array for name, array in tree_flatten(module.trainable_parameters())}
        self.model.update(tree_unflatten([(name, array.astype(mx.float32)) for name, array in originals.items()]))
        return originals

    def _computed_dtypes(self) -> dict[str, mx.Dtype]:
        """Return the dtypes of the base, by name of a trained array; magnitudes keep float32."""
        dtypes = {name: array.dtype for name, array in self._originals.items()}
        for name, module in self._adapters():
            dtypes |= dict.fromkeys((f"{name}.lora_a", f"{name}.lora_b"), _dtype_of(module))
        return dtypes

    def _adapters(self) -> list[tuple[str, nn.Module]]:
        return [(name, m) for name, m in self.model.named_modules() if hasattr(m, "lora_a")]

    def _pissa_layers(self) -> list[tuple[str, PissaLinear]]:
        if self.lora.init != "pissa":
            return []
        return [(name, m) for name, m in self._adapters() if isinstance(m, PissaLinear)]


def stored_lora(lora: schema.LoraConfig) -> schema.LoraConfig:
    """Return the shape of the adapter that checkpoints of a run with `lora` hold: see `AdaptedModel.to_stored`."""
    if lora.init != "pissa":
        return lora
    scale = validation.lora_scale(lora)
    return dataclasses.replace(lora, init="default", rank=2 * lora.rank, scale=scale, alpha=None, rslora=False)


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
