"""`--to peft`: an adapter folder that PEFT loads onto the same base model in transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from runner.checkpoints.safetensors_file import pack
from runner.common.errors import ModelError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG
from runner.config.validation import lora_scale
from runner.export.fidelity import EXACT_LIMIT, FidelityRows, Measured
from runner.export.model_card import base_id
from runner.export.target import Target
from runner.export.trained_adapter import TrainedAdapter
from runner.models.arrays import to_tensors
from runner.models.lora import AdaptedModel, Params
from runner.models.peft.config import PREFIX, WEIGHTS
from runner.models.peft.families import PeftFamily, find_family, split_name
from runner.models.peft.read import fit, read_adapter


class PeftTarget(Target):
    """`--to peft`."""

    limit = EXACT_LIMIT

    def write(self, trained: TrainedAdapter, path: Path) -> None:
        """Write weights and config. Raises ModelError for a layer that PEFT cannot adapt."""
        assert trained.adapted is not None
        family = find_family(trained.adapted.base.config.get("model_type"))
        _refuse_tied_embedding(trained)
        converted = convert_weights(trained.weights, family, trained.adapted.targets.whole)
        config = adapter_config(trained, family, converted)
        FileSystem().write_file(path / WEIGHTS, pack(to_tensors(converted.tensors), {"format": "pt"}))
        FileSystem().write_file(path / ADAPTER_CONFIG, f"{json.dumps(config, indent=2)}\n".encode())

    def measure(self, trained: TrainedAdapter, path: Path, rows: FidelityRows) -> Measured:
        """Read the folder as `adapter=` does."""
        assert trained.adapted is not None
        adapter = read_adapter(path, find_family(trained.adapted.base.config.get("model_type")))
        weights = fit(adapter, trained.weights, trained.lora, path, tied=trained.adapted.is_tied)
        return rows.measure(trained.with_weights(weights), weights)


@dataclass
class Converted:
    """An adapter by PEFT's names."""

    tensors: Params = field(default_factory=dict)
    layers: dict[str, set[int | None]] = field(default_factory=dict)
    """Names of the adapted layers, inside a block where they are in one, with the numbers of their blocks."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks by the layers' full names in transformers."""
    saved: set[str] = field(default_factory=set)
    """Full names in transformers of the modules that were trained whole."""


def convert_weights(weights: Params, family: PeftFamily, whole: Collection[str] = ()) -> Converted:
    """Return the adapter's arrays by PEFT's names; `whole`: the modules that were trained whole.

    Raises:
        ModelError: a layer that PEFT cannot adapt.
    """
    found = Converted()
    for layer in sorted({name.rpartition(".")[0] for name in weights if name.endswith("lora_a")}):
        _convert_layer(layer, weights, family, found)
    for name, array in weights.items():
        module = next((path for path in whole if name.startswith(f"{path}.")), None)
        if module is not None:
            theirs = _in_transformers(module, family)
            found.tensors[f"{PREFIX}{theirs}.{name.removeprefix(f'{module}.')}"] = array.astype(mx.float32)
            found.saved.add(theirs)
    mx.eval(found.tensors)
    return found


def _convert_layer(layer: str, weights: Params, family: PeftFamily, found: Converted) -> None:
    a, b = weights[f"{layer}.lora_a"].astype(mx.float32), weights[f"{layer}.lora_b"].astype(mx.float32)
    split = split_name(layer, family.own_blocks)
    block, name = split or (None, layer)
    for refused, reason in family.refused.items():
        if split and name.startswith(refused):
            raise ModelError(f"{name} cannot be carried to PEFT: {reason}. Leave it out of lora.keys, or --to fused.")
    module = _in_transformers(layer, family)
    if a.ndim == 2:
        embedding = layer.rpartition(".")[2] == "embed_tokens"
        suffix = "lora_embedding_{}" if embedding else "lora_{}.weight"
        for factor, array in (("A", a), ("B", b)):
            found.tensors[f"{PREFIX}{module}.{suffix.format(factor)}"] = mx.contiguous(array.T)
        if f"{layer}.m" in weights:
            found.tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = weights[f"{layer}.m"].astype(mx.float32)
        target = name.rpartition(".")[2] if family.experts else name
        found.layers.setdefault(target, set()).add(block)
        found.ranks[module] = a.shape[1]
        return
    experts, leaf = family.experts, name.rpartition(".")[2]
    if experts is None or name != f"{experts.own}.{leaf}":
        raise ModelError(f"{name} is a layer of experts, which cannot be carried to PEFT for this architecture.")
    found.layers.setdefault(experts.names[leaf], set()).add(block)
    for number in range(a.shape[0]):
        expert = f"{family.blocks}.{block}.{experts.theirs}.{number}.{experts.names[leaf]}"
        found.tensors[f"{PREFIX}{expert}.lora_A.weight"] = mx.contiguous(a[number])
        found.tensors[f"{PREFIX}{expert}.lora_B.weight"] = mx.contiguous(b[number])
        found.ranks[expert] = a.shape[1]


def _in_transformers(module: str, family: PeftFamily) -> str:
    """Return the name in transformers of a layer that has the same name inside its block there, or outside of it."""
    if split := split_name(module, family.own_blocks):
        return f"{family.blocks}.{split[0]}.{split[1]}"
    if family.blocks != family.own_blocks:
        raise ModelError(f"{module} is not inside a block, and its name in transformers is not known here: --to fused.")
    return module


def adapter_config(trained: TrainedAdapter, family: PeftFamily, converted: Converted) -> dict[str, Any]:
    """Return PEFT's adapter_config.json.

    Raises:
        ModelError: experts are adapted in blocks of their own, which PEFT's names cannot say.
    """
    assert trained.adapted is not None
    lora, depth = trained.lora, trained.adapted.depth
    alpha = lora_scale(lora) * lora.rank if lora.alpha is None else lora.alpha
    own_ranks = {module: rank for module, rank in converted.ranks.items() if rank != lora.rank}
    # With lora.scale the factor is the same in every layer; PEFT divides alpha by the layer's own rank.
    alphas = {module: _number(lora_scale(lora) * rank) for module, rank in own_ranks.items()}
    blocks, targets, irregular = _where(converted, trained.adapted)
    if family.experts and own_ranks:
        raise ModelError("Ranks that differ by layer (lora.rank_pattern) are not carried to PEFT's experts: --to mlx.")
    if irregular and family.experts:
        raise ModelError(
            "PEFT names the layers of experts without their blocks, and this adapter has other layers in some blocks "
            "than in others (lora.keys). --to mlx or fused."
        )
    every = irregular or len(blocks) == depth
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id(trained.config, None) or trained.config.model.path,
        "r": lora.rank,
        "lora_alpha": _number(alpha),
        "use_rslora": lora.rslora and lora.alpha is not None,
        # PEFT cannot compute dropout on experts; it matters to a further training alone.
        "lora_dropout": 0.0 if family.experts else lora.dropout,
        "target_modules": targets,
        "layers_to_transform": None if every else sorted(blocks),
        "layers_pattern": None if every else family.layers_pattern,
        "rank_pattern": {re.escape(module): rank for module, rank in own_ranks.items()},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items()} if lora.alpha is None else {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": lora.type == "dora",
        "modules_to_save": sorted(converted.saved) or None,
        "inference_mode": True,
    }


def _where(converted: Converted, adapted: AdaptedModel) -> tuple[set[int], list[str], bool]:
    """Return the adapted blocks, target_modules, and whether the latter are full names.

    Names inside the blocks do where every layer that has one of them is adapted in all of these blocks.
    """
    blocks = {block for found in converted.layers.values() for block in found if block is not None}
    count, keys = adapted.targets.stock_keys(adapted.num_layers)
    last = set(range(adapted.depth - count, adapted.depth))
    regular = not any(key in {t.path for t in adapted.targets.adapted} for key in keys) and blocks <= last
    return (blocks, sorted(converted.layers), False) if regular else (blocks, sorted(converted.ranks), True)


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _refuse_tied_embedding(trained: TrainedAdapter) -> None:
    """Refuse what is trained of an embedding that is the head as well: PEFT trains it in its first place alone."""
    assert trained.adapted is not None
    outside = [path for path in trained.adapted.targets.outside if path.rpartition(".")[2] == "embed_tokens"]
    if outside and trained.adapted.is_tied:
        raise ModelError(
            f"{outside[0]} is the head of this model as well (tied), where PEFT would not adapt it. --to mlx or fused."
        )
