"""The layers of experts in an adapter of PEFT, in both of its forms, as the stacked arrays of mlx-lm.

On transformers 4 each expert is a module with factors of its own: `mlp.experts.3.up_proj`. On transformers 5 all
experts are one parameter: `mlp.experts` adapts `down_proj`, and `mlp.experts.base_layer` inside it `gate_up_proj`, with
the outputs of gate and up one after the other. There A is (experts rank, in), and B (out, rank experts).
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from runner.common.errors import ModelError
from runner.models.peft.families import DOWN, Experts

Pair = tuple[mx.array, mx.array]


def unstack(pair: Pair, parameter: str, rank: int, experts: Experts) -> dict[str, Pair]:
    """Return the factors of mlx-lm's layers, (experts, rank, in) and (experts, out, rank), by their names.

    Raises:
        ModelError: the shapes do not fit each other.
    """
    a, b = pair
    count, rest = divmod(a.shape[0], rank)
    if rest or a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
        raise ModelError(
            f"The factors of {experts.stacked} are {a.shape} and {b.shape}, which do not fit the rank {rank}."
        )
    a = a.reshape(count, rank, a.shape[1])
    b = b.reshape(b.shape[0], rank, count).transpose(2, 0, 1)
    if parameter == DOWN:
        return {f"{experts.own}.down_proj": (a, b)}
    gate, up = mx.split(b, 2, axis=1)
    return {f"{experts.own}.gate_proj": (a, gate), f"{experts.own}.up_proj": (a, up)}


def stack(name: str, members: Mapping[int, tuple[mx.array, mx.array, float]]) -> tuple[mx.array, mx.array, float]:
    """Return the factors of all experts as one array each, and their common scale.

    Raises:
        ModelError: experts are missing, or differ in their ranks.
    """
    numbers = sorted(members)
    shapes = {(members[i][0].shape, members[i][1].shape) for i in numbers}
    if numbers != list(range(len(numbers))) or len(shapes) > 1:
        raise ModelError(f"The adapter's experts of {name} are not all there, or differ in their ranks.")
    scale = members[0][2]
    a = mx.stack([members[i][0] for i in numbers])
    b = mx.stack([members[i][1] * (members[i][2] / scale if scale else 1.0) for i in numbers])
    return a, b, scale
