"""The layers of experts in an adapter of PEFT, in both of its forms, as the stacked arrays of mlx-lm.

On transformers 4 each expert is a module with factors of its own: `mlp.experts.3.up_proj`. On transformers 5 all
experts are one parameter: `mlp.experts` adapts `down_proj`, and `mlp.experts.base_layer` inside it `gate_up_proj`, with
the outputs of gate and up one after the other. There A is (experts rank, in), and B (out, rank experts).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import mlx.core as mx

from runner.common.errors import ModelError
from runner.common.text import shorten
from runner.models.peft.families import Experts

Pair = tuple[mx.array, mx.array]
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


def single_expert(name: str, experts: Experts) -> tuple[str, int] | None:
    """Return mlx-lm's name of the stacked layer, and the number of the expert, of `mlp.experts.3.up_proj`.

    Raises:
        ModelError: it is a layer that an expert does not have.
    """
    if not name.startswith(f"{experts.theirs}."):
        return None
    number, _, leaf = name.removeprefix(f"{experts.theirs}.").partition(".")
    if not number.isdecimal():
        return None
    own = {theirs: own for own, theirs in experts.names.items()}.get(leaf)
    if own is None or len(number) > 5:
        raise ModelError(f"The adapter's layer {shorten(name)} is none of an expert.")
    return f"{experts.own}.{own}", int(number)


def stacked_parameter(name: str, experts: Experts, targets: Collection[str]) -> str | None:
    """Return which parameter of all experts the module `name` adapts, or None if it is none of them.

    `targets`: PEFT's target_parameters.
    """
    if name == f"{experts.stacked}.base_layer":
        return _GATE_UP
    if name != experts.stacked:
        return None
    return _DOWN if any(target.endswith(_DOWN) for target in targets) else _GATE_UP


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
    if parameter == _DOWN:
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
