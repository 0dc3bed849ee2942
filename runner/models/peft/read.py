"""Read an adapter that PEFT saved, for a warm start: `adapter=FOLDER`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from runner.checkpoints.safetensors_file import read_header
from runner.common.errors import ModelError
from runner.common.filesystem import FileSystem
from runner.common.text import shorten
from runner.config.schema import LoraConfig
from runner.config.validation import lora_scale
from runner.models.arrays import parse_arrays
from runner.models.peft.config import MAGNITUDE, WHOLE, parse_name, read_config, weights_file
from runner.models.peft.experts import stack, unstack
from runner.models.peft.families import PeftFamily, single_expert, split_name, stacked_parameter

_MAX_WEIGHTS = 1 << 36  # bytes


@dataclass(frozen=True)
class PeftLayer:
    """The adapter of one layer of mlx-lm, in mlx-lm's layout; of experts with their axis in front."""

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    rank_axes: tuple[int, int]
    """The axes of the rank in A and B."""
    magnitude: mx.array | None = None
    """Of DoRA, (outputs,)."""

    @property
    def rank(self) -> int:
        """The rank of the layer."""
        return self.lora_a.shape[self.rank_axes[0]]


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter by mlx-lm's dotted names."""

    layers: dict[str, PeftLayer]
    whole: dict[str, mx.array]
    """The arrays of modules that were trained whole."""


def read_adapter(folder: Path, family: PeftFamily) -> PeftAdapter:
    """Return the adapter in `folder`.

    Raises:
        ModelError: a layer is not known, a factor is missing or has another shape, or it is no plain LoRA.
        CheckpointError: the weights are damaged or not finite.
    """
    config = read_config(folder)
    file = weights_file(folder)
    read_header(file)  # refuses a hostile file before its bytes fill the memory
    arrays = parse_arrays(FileSystem().read_file(file, _MAX_WEIGHTS), source=str(file))
    factors: dict[str, dict[str, mx.array]] = {}
    whole: dict[str, mx.array] = {}
    for name, array in arrays.items():
        module, factor = parse_name(name, folder)
        if factor == WHOLE:
            if not config.modules_to_save:
                raise ModelError(f"adapter={folder}: the array {shorten(name)} is of no module in modules_to_save.")
            whole[_own_name(module, family)] = array.astype(mx.float32)
            continue
        factors.setdefault(module, {})[factor] = array.astype(mx.float32)
    layers: dict[str, PeftLayer] = {}
    members: dict[str, dict[int, tuple[mx.array, mx.array, float]]] = {}
    experts = family.experts
    for module, pair in factors.items():
        a, b = _both(pair, module, folder)
        split = split_name(module, family.blocks)
        if split is None:
            _require_rank(a, b, config.rank_of(module), module, folder)
            scale = config.scale_of(module)
            layers[_own_name(module, family)] = PeftLayer(a.T, b.T, scale, (1, 0), pair.get(MAGNITUDE))
            continue
        block, name = split
        own = f"{family.own_blocks}.{block}"
        if experts and (parameter := stacked_parameter(name, experts, config.target_parameters)):
            target = f"{family.blocks}.{block}.{experts.stacked}.{parameter}"
            unstacked = unstack((a, b), parameter, config.rank_of(target), experts)
            for leaf, (a, b) in unstacked.items():
                layers[f"{own}.{leaf}"] = PeftLayer(a, b, config.scale_of(target), (1, 2))
            continue
        _require_rank(a, b, config.rank_of(module), module, folder)
        if experts and (found := single_expert(name, experts)):
            members.setdefault(f"{own}.{found[0]}", {})[found[1]] = (a, b, config.scale_of(module))
        else:
            layer = PeftLayer(a.T, b.T, config.scale_of(module), (1, 0), pair.get(MAGNITUDE))
            layers[f"{own}.{family.aliases.get(name, name)}"] = layer
    for name, group in members.items():
        layers[name] = PeftLayer(*stack(name, group), (1, 2))
    return PeftAdapter(layers, whole)


def fit(
    adapter: PeftAdapter, params: Mapping[str, mx.array], lora: LoraConfig, folder: Path, *, tied: bool
) -> dict[str, Any]:
    """Return the arrays of a run's adapter, of the names and shapes of `params`, that compute what `adapter` does.

    The factor of an update that differs from the run's is carried in B. A layer of a lower rank than the run's gets the
    run's own A for the other factors, and zeros in B, as a new adapter has them. `tied`: whether the model's embedding
    is its head, too.

    Raises:
        ModelError: the run adapts other layers, or has a lower rank or the scale zero; says what to set.
    """
    layers = adapter.layers
    own = {name.rpartition(".")[0] for name in params if name.endswith(".lora_a")}
    if missing := sorted(own ^ layers.keys()):
        which = "does not have" if missing[0] in own else "has"
        raise _unfit(folder, f"it {which} {shorten(missing[0])} ({len(missing)} layers differ)")
    own_whole = {name for name in params if name.rpartition(".")[2] not in ("lora_a", "lora_b", "m")}
    if missing := sorted(own_whole ^ adapter.whole.keys()):
        which = "did not train" if missing[0] in own_whole else "trained"
        raise _unfit(folder, f"it {which} {shorten(missing[0])} whole (lora.modules_to_save)")
    embeddings = [name for name in (*layers, *adapter.whole) if ".embed_tokens" in f".{name}"]
    if tied and embeddings:
        raise ModelError(
            f"adapter={folder}: it trained {shorten(embeddings[0])}, which in this model is the head as well (tied), "
            "and PEFT trains it in its first place alone: a run here cannot hold that."
        )
    is_dora = any(layer.magnitude is not None for layer in layers.values())
    if is_dora != (lora.type == "dora"):
        raise _unfit(folder, f"it is {'a DoRA adapter' if is_dora else 'no DoRA adapter'}, and lora.type={lora.type}")
    scale = lora_scale(lora)
    if scale == 0:
        raise _unfit(folder, "lora.scale is 0")
    fitted = {}
    for name, layer in layers.items():
        a, b = params[f"{name}.lora_a"], params[f"{name}.lora_b"]
        axis_a, axis_b = layer.rank_axes
        rank = a.shape[axis_a]
        if layer.rank > rank:
            raise _unfit(folder, f"{name} has the rank {layer.rank}, and lora.rank is {rank}")
        rest_a = mx.split(a, [layer.rank], axis=axis_a)[1]
        rest_b = mx.zeros_like(mx.split(b, [layer.rank], axis=axis_b)[1])
        factor = layer.scale / lora_scale(lora, rank)
        fitted[f"{name}.lora_a"] = mx.concatenate([layer.lora_a, rest_a], axis=axis_a)
        fitted[f"{name}.lora_b"] = mx.concatenate([layer.lora_b * factor, rest_b], axis=axis_b)
        if layer.magnitude is not None:
            if layer.magnitude.shape != params[f"{name}.m"].shape:
                raise _unfit(folder, f"the magnitudes of {name} are {layer.magnitude.shape}")
            fitted[f"{name}.m"] = layer.magnitude
    for name, array in adapter.whole.items():
        if array.shape != params[name].shape:
            raise _unfit(folder, f"{name} is {array.shape}, and {params[name].shape} here")
        fitted[name] = array
    mx.eval(fitted)
    return fitted


def _unfit(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"adapter={folder} does not fit this run: {reason}. The settings that fit: python -m runner import {folder}"
    )


def _own_name(module: str, family: PeftFamily) -> str:
    """Return mlx-lm's name of an array or layer of transformers, which it has under the same one but for its blocks."""
    if found := split_name(module, family.blocks):
        return f"{family.own_blocks}.{found[0]}.{family.aliases.get(found[1], found[1])}"
    if family.blocks != family.own_blocks:
        raise ModelError(f"{shorten(module)} is outside the blocks, and its name here is not known.")
    return module


def _both(pair: Mapping[str, mx.array], module: str, folder: Path) -> tuple[mx.array, mx.array]:
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None:
        raise ModelError(f"adapter={folder}: {shorten(module)} has only one of its two factors.")
    return a, b


def _require_rank(a: mx.array, b: mx.array, rank: int, module: str, folder: Path) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(
            f"adapter={folder}: the factors of {shorten(module)} are {a.shape} and {b.shape}, not of rank {rank}."
        )
