"""`--to peft`: an adapter folder that PEFT loads onto the same base model in transformers."""

from __future__ import annotations

import json
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
from runner.models.lora import Params
from runner.models.peft.config import PREFIX, WEIGHTS
from runner.models.peft.families import PeftFamily, find_family, split_name
from runner.models.peft.read import fit, read_layers
from runner.models.quantization import module_at


class PeftTarget(Target):
    """`--to peft`."""

    limit = EXACT_LIMIT

    def write(self, trained: TrainedAdapter, path: Path) -> None:
        """Write weights and config. Raises ModelError for a layer that PEFT cannot adapt."""
        assert trained.adapted is not None
        family = find_family(trained.adapted.base.config.get("model_type"))
        _refuse_embeddings(trained)
        tensors, targets, blocks = convert_weights(trained.weights, family)
        depth = len(trained.adapted.model.layers)
        config = adapter_config(trained, family, sorted(targets), blocks, depth)
        FileSystem().write_file(path / WEIGHTS, pack(to_tensors(tensors), {"format": "pt"}))
        FileSystem().write_file(path / ADAPTER_CONFIG, f"{json.dumps(config, indent=2)}\n".encode())

    def measure(self, trained: TrainedAdapter, path: Path, rows: FidelityRows) -> Measured:
        """Read the folder as `adapter=` does."""
        assert trained.adapted is not None
        layers = read_layers(path, find_family(trained.adapted.base.config.get("model_type")))
        weights = fit(layers, trained.weights, lora_scale(trained.lora), path)
        return rows.measure(trained.with_weights(weights), weights)


def convert_weights(weights: Params, family: PeftFamily) -> tuple[Params, set[str], set[int]]:
    """Return the adapter's arrays by PEFT's names, the names of the layers inside a block, and the adapted blocks.

    Raises:
        ModelError: a layer that PEFT cannot adapt.
    """
    tensors: Params = {}
    targets, blocks = set[str](), set[int]()
    for layer in sorted({name.rpartition(".")[0] for name in weights}):
        a, b = weights[f"{layer}.lora_a"].astype(mx.float32), weights[f"{layer}.lora_b"].astype(mx.float32)
        found = split_name(layer, family.own_blocks)
        if found is None:
            raise ModelError(f"{layer} is not inside a block, where PEFT would look for it.")
        block, name = found
        for refused, reason in family.refused.items():
            if name.startswith(refused):
                raise ModelError(
                    f"{name} cannot be carried to PEFT: {reason}. Leave it out of lora.keys, or --to fused."
                )
        blocks.add(block)
        prefix = f"{PREFIX}{family.blocks}.{block}"
        if a.ndim == 2:
            tensors[f"{prefix}.{name}.lora_A.weight"] = mx.contiguous(a.T)
            tensors[f"{prefix}.{name}.lora_B.weight"] = mx.contiguous(b.T)
            targets.add(name.rpartition(".")[2] if family.experts else name)
            continue
        experts = family.experts
        leaf = name.rpartition(".")[2]
        if experts is None or name != f"{experts.own}.{leaf}":
            raise ModelError(f"{name} is a layer of experts, which cannot be carried to PEFT for this architecture.")
        targets.add(experts.names[leaf])
        for number in range(a.shape[0]):
            module = f"{prefix}.{experts.theirs}.{number}.{experts.names[leaf]}"
            tensors[f"{module}.lora_A.weight"] = mx.contiguous(a[number])
            tensors[f"{module}.lora_B.weight"] = mx.contiguous(b[number])
    mx.eval(tensors)
    return tensors, targets, blocks


def adapter_config(
    trained: TrainedAdapter, family: PeftFamily, targets: list[str], blocks: set[int], depth: int
) -> dict[str, Any]:
    """Return PEFT's adapter_config.json."""
    lora = trained.lora
    alpha = lora_scale(lora) * lora.rank if lora.alpha is None else lora.alpha
    every = len(blocks) == depth
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id(trained.config, None) or trained.config.model.path,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": lora.rslora and lora.alpha is not None,
        # PEFT cannot compute dropout on experts; it matters to a further training alone.
        "lora_dropout": 0.0 if family.experts else lora.dropout,
        "target_modules": targets,
        "layers_to_transform": None if every else sorted(blocks),
        "layers_pattern": None if every else family.layers_pattern,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _refuse_embeddings(trained: TrainedAdapter) -> None:
    assert trained.adapted is not None
    for name in {name.rpartition(".")[0] for name in trained.weights}:
        if "embedding" in module_at(trained.adapted.model, name):
            raise ModelError(f"{name} is an embedding, whose adapter cannot be carried to PEFT. --to mlx or fused.")
