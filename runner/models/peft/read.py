"""Read a LoRA adapter that PEFT saved, for a warm start: `adapter=FOLDER`.

Every layer has a rank and an alpha of its own (`rank_pattern`, `alpha_pattern`), the factor of an update is
alpha / rank, with `use_rslora` alpha / sqrt(rank). What is no plain LoRA is refused with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from runner.checkpoints.safetensors_file import read_header
from runner.common import safe_json
from runner.common.errors import ModelError, RunnerError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG
from runner.common.text import shorten
from runner.models.arrays import parse_arrays
from runner.models.peft.experts import single_expert, stack, stacked_parameter, unstack
from runner.models.peft.families import PeftFamily, split_name

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 8 << 20
_MAX_CONFIG_VALUES = 200_000
_MAX_PATTERNS = 1_000
_MAX_WEIGHTS = 1 << 36  # bytes
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_PATTERN = re.compile(r"\^?(?:[\w-]|\\\.|\.\*|\.)+\$?")
"""The regular expressions of rank_pattern and alpha_pattern that are read: any other could take forever to match."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")
_UNSUPPORTED = {
    "use_dora": "it is a DoRA adapter",
    "use_qalora": "it is a QALoRA adapter",
    "use_bdlora": "it is a block-diagonal LoRA adapter",
    "lora_bias": "its B has biases",
    "modules_to_save": "it trained whole modules as well (modules_to_save)",
    "trainable_token_indices": "it trained embeddings of tokens as well (trainable_token_indices)",
    "layer_replication": "it replicates layers",
    "alora_invocation_tokens": "it is an activated LoRA adapter",
    "arrow_config": "it is a router of adapters (Arrow)",
    "kasa_config": "it is a KaSA adapter",
    "velora_config": "it is a VeLoRA adapter",
}


@dataclass(frozen=True)
class PeftConfig:
    """The part of PEFT's adapter_config.json that decides what a LoRA adapter computes."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank of the layer with this name in transformers."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of the update of the layer with this name."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class PeftLayer:
    """The adapter of one layer of mlx-lm, in mlx-lm's layout; of experts with their axis in front."""

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    rank_axes: tuple[int, int]
    """The axes of the rank in A and B."""

    @property
    def rank(self) -> int:
        """The rank of the layer."""
        return self.lora_a.shape[self.rank_axes[0]]


def is_peft_folder(path: Path) -> bool:
    """Return whether `path` is a folder with an adapter of PEFT; that of mlx-lm has a file of the same name."""
    try:
        return "peft_type" in _parse_config(path)
    except (RunnerError, ValueError):
        return False


def read_config(folder: Path) -> PeftConfig:
    """Read the adapter_config.json of an adapter of PEFT.

    Raises:
        ModelError: it is malformed, or no plain LoRA.
    """
    where = f"{folder / ADAPTER_CONFIG}"
    try:
        config = _parse_config(folder)
    except ValueError as error:
        raise ModelError(f"{where}: {error}.") from None
    if reason := _unsupported(config):
        raise ModelError(f"adapter={folder}: {reason}, which cannot be read: plain LoRA alone can.")
    patterns: list[dict[str, Any]] = []
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or len(pattern) > _MAX_PATTERNS:
            raise ModelError(f"{where}: {name} is not an object of up to {_MAX_PATTERNS} names.")
        patterns.append(pattern)
    rank, alpha = config.get("r", 8), safe_json.finite_number(config.get("lora_alpha", 8))
    ranks, alphas = patterns[0].values(), [safe_json.finite_number(value) for value in patterns[1].values()]
    if not all(safe_json.is_count(value) and 0 < value <= 16_384 for value in (rank, *ranks)):
        raise ModelError(f"{where}: a rank is not a whole number from 1 to 16,384.")
    dropout = safe_json.finite_number(config.get("lora_dropout", 0.0))
    if alpha is None or dropout is None or None in alphas:
        raise ModelError(f"{where}: lora_alpha or lora_dropout is not a number.")
    base, targets = config.get("base_model_name_or_path"), config.get("target_parameters") or []
    return PeftConfig(
        rank=rank,
        alpha=alpha,
        rslora=config.get("use_rslora") is True,
        dropout=dropout,
        rank_pattern=patterns[0],
        alpha_pattern=dict(zip(patterns[1], (value for value in alphas if value is not None), strict=True)),
        target_parameters=tuple(map(str, targets)) if isinstance(targets, list) else (),
        base_model=base if isinstance(base, str) and base else None,
    )


def module_names(folder: Path) -> list[str]:
    """Return the names in transformers of the layers that the adapter has, from the header of its weights alone."""
    spans, _ = read_header(_weights_file(folder))
    return sorted({_parse_name(name, folder)[0] for name in spans})


def read_layers(folder: Path, family: PeftFamily) -> dict[str, PeftLayer]:
    """Return the adapter's layers by mlx-lm's dotted names.

    Raises:
        ModelError: a layer is not known, a factor is missing or has another shape, or it is no plain LoRA.
        CheckpointError: the weights are damaged or not finite.
    """
    config = read_config(folder)
    file = _weights_file(folder)
    read_header(file)  # refuses a hostile file before its bytes fill the memory
    arrays = parse_arrays(FileSystem().read_file(file, _MAX_WEIGHTS), source=str(file))
    factors: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        module, factor = _parse_name(name, folder)
        factors.setdefault(module, {})[factor] = array.astype(mx.float32)
    layers: dict[str, PeftLayer] = {}
    members: dict[str, dict[int, tuple[mx.array, mx.array, float]]] = {}
    experts = family.experts
    for module, pair in factors.items():
        block, name = _in_block(module, family, folder)
        a, b = _both(pair, module, folder)
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
            layers[f"{own}.{family.aliases.get(name, name)}"] = PeftLayer(a.T, b.T, config.scale_of(module), (1, 0))
    for name, group in members.items():
        layers[name] = PeftLayer(*stack(name, group), (1, 2))
    return layers


def fit(layers: Mapping[str, PeftLayer], params: Mapping[str, mx.array], scale: float, folder: Path) -> dict[str, Any]:
    """Return the arrays of a run's adapter, of the names and shapes of `params`, that compute what `layers` do.

    The factor of an update that differs from the run's `scale` is carried in B. A layer of a lower rank than the run's
    gets the run's own A for the other factors, and zeros in B, as a new adapter has them.

    Raises:
        ModelError: the run adapts other layers, or has a lower rank or the scale zero; says what to set.
    """
    own = {name.rpartition(".")[0] for name in params}
    if missing := sorted(own ^ layers.keys()):
        which = "does not have" if missing[0] in own else "has"
        raise _unfit(folder, f"it {which} {shorten(missing[0])} ({len(missing)} layers differ)")
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
        factor = layer.scale / scale
        fitted[f"{name}.lora_a"] = mx.concatenate([layer.lora_a, rest_a], axis=axis_a)
        fitted[f"{name}.lora_b"] = mx.concatenate([layer.lora_b * factor, rest_b], axis=axis_b)
    mx.eval(fitted)
    return fitted


def _unfit(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"adapter={folder} does not fit this run: {reason}. The settings that fit: python -m runner import {folder}"
    )


def _parse_config(folder: Path) -> dict[str, Any]:
    data = FileSystem().read_file(folder / ADAPTER_CONFIG, _MAX_CONFIG_BYTES)
    return safe_json.parse_object(data, max_values=_MAX_CONFIG_VALUES)


def _unsupported(config: Mapping[str, Any]) -> str | None:
    if config.get("peft_type") != "LORA":
        return f"its peft_type is {shorten(config.get('peft_type'), 40)}"
    if config.get("bias", "none") != "none":
        return f"it trained biases as well (bias: {shorten(config['bias'], 40)})"
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            return reason
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        return f"it belongs to a base model that its initialization changed (init_lora_weights: {shorten(start, 40)})"
    return None


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = " adapter_model.bin is a pickle, which may run code and is never loaded." * bool(
            (folder / "adapter_model.bin").exists()
        )
        raise ModelError(f"adapter={folder}: it has no {WEIGHTS}.{pickled}")
    return file


def _parse_name(name: str, folder: Path) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        what = "DoRA" if "lora_magnitude" in name else "an embedding's" if "lora_embedding" in name else "not known"
        raise ModelError(f"adapter={folder}: the array {shorten(name)} is {what}; plain LoRA alone can be read.")
    return match["module"], match["factor"]


def _in_block(module: str, family: PeftFamily, folder: Path) -> tuple[int, str]:
    found = split_name(module, family.blocks)
    if found is None:
        raise ModelError(
            f"adapter={folder}: it adapts {shorten(module)}, which is no layer of a block ({family.blocks}.N): here "
            "those alone are adapted."
        )
    return found


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


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a layer's name, as PEFT matches it."""
    for pattern, value in patterns.items():
        if not _PATTERN.fullmatch(pattern) or pattern.count("*") > 3:
            raise ModelError(
                f"The pattern {shorten(pattern, 60)} of a PEFT adapter is not supported: names, dots and .* are."
            )
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
