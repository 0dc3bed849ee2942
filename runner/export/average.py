"""The average of several checkpoints of one run: of their updates, exactly, as one adapter of a higher rank.

The update of a layer is the product scale A B. Averaging A and B apart would average something else: the mean of the
products has terms A_i B_i alone, the product of the means has A_i B_j as well. With the factors of N checkpoints side
by side, A = [A_1 … A_N] and B = [B_1; …; B_N] / N, the product is the mean of the updates to the last digit, in every
format that holds a rank. The adapter is N times as large; a fused model is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from runner.config.schema import LoraConfig
from runner.export.trained_adapter import resolved_lora
from runner.models.layer_keys import parse_rank_pattern
from runner.models.lora import Params


def average_updates(checkpoints: Sequence[Params], lora: LoraConfig) -> tuple[Params, LoraConfig]:
    """Return the adapter whose update is the mean of those of `checkpoints`, and its shape; `lora` is that of each."""
    count = len(checkpoints)
    averaged = {}
    for name in checkpoints[0]:
        arrays = [weights[name] for weights in checkpoints]
        if not name.endswith(("lora_a", "lora_b")):  # a weight that was trained whole
            averaged[name] = mx.stack(arrays).mean(axis=0)
            continue
        averaged[name] = mx.concatenate(arrays, axis=_rank_axis(name, arrays[0]))
        if name.endswith("lora_b"):
            averaged[name] = averaged[name] / count
    mx.eval(list(averaged.values()))
    if lora.type == "full":
        return averaged, lora
    if not lora.rank_pattern:
        return averaged, replace(resolved_lora(lora), rank=lora.rank * count)
    patterns = [f"{key}:{rank * count}" for key, rank in parse_rank_pattern(lora.rank_pattern)]
    # The factor alpha / rank of each layer stays what it was.
    alpha = None if lora.alpha is None else lora.alpha * (math.sqrt(count) if lora.rslora else count)
    return averaged, replace(lora, rank=lora.rank * count, rank_pattern=patterns, alpha=alpha)


def padded(weights: Params, like: Params) -> Params:
    """Return the same adapter with the rank that `like` has: zeros in the place of further factors."""
    result = {}
    for name, array in weights.items():
        if array.shape == like[name].shape:
            result[name] = array
            continue
        axis = _rank_axis(name, array)
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, like[name].shape[axis] - array.shape[axis])
        result[name] = mx.pad(array, widths)
    return result


def _rank_axis(name: str, array: mx.array) -> int:
    """Return the axis of the rank: A is (in, rank), B (rank, out); of experts (…, rank, in), (…, out, rank)."""
    if array.ndim == 3:
        return 1 if name.endswith("lora_a") else 2
    return 1 if name.endswith("lora_a") else 0
