"""Whether stock mlx-lm can load an adapter as its checkpoints hold it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn

from runner.models import quantization
from runner.models.load import BaseModel
from runner.models.lora import AdaptedModel

_WIDTHS_THAT_DIVIDE = (2, 4, 8)
"""Bits with which mlx-lm's DoRA finds the width of a layer."""


@dataclass(frozen=True)
class StockProblem:
    """Why stock mlx-lm cannot load an adapter, as the end of a sentence, and the export that carries it."""

    reason: str
    export: str


def stock_problem(adapted: AdaptedModel) -> StockProblem | None:
    """Return why stock mlx-lm cannot load the adapter onto its base model; None where it can."""
    lora, targets = adapted.lora, adapted.targets
    if lora.type == "full":
        if adapted.base.expanded:
            return StockProblem("it holds whole weights, and the base is quantized where mlx-lm loads it", "fused")
        return None
    if targets.whole:
        return StockProblem("it has modules that are trained whole (lora.modules_to_save)", "fused")
    if lora.type == "dora":
        for target in targets.adapted:
            if problem := _dora_problem(target.path, target.module, adapted.base):
                return StockProblem(problem, "fused")
    if {target.rank for target in targets.adapted} != {lora.rank}:
        return StockProblem("its layers differ in their ranks (lora.rank_pattern)", "mlx")
    return None


def _dora_problem(path: str, module: nn.Module, base: BaseModel) -> str | None:
    expanded = base.expanded.get(path)
    if expanded is None and not quantization.is_quantized(module):
        return None
    bits = expanded[0] if expanded else module.bits
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return f"{path} is a quantized embedding, of which it has no DoRA"
    if bits not in _WIDTHS_THAT_DIVIDE:
        return f"its DoRA does not read weights of {bits} bits"
    return None
