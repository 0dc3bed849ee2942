"""Gradient checkpointing of single blocks (Chen et al., "Training deep nets with sublinear memory cost", 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from runner.models.stand_in import stand_in


@contextmanager
def gradient_checkpointing(blocks: Sequence[nn.Module], on: bool = True) -> Iterator[None]:
    """Recompute each block's activations in the backward pass of what is traced inside this context.

    mlx-lm's `grad_checkpoint` replaces the method of the model's class for good; here the blocks are replaced for the
    time being. Gradients pass through a block's parameters and through every floating-point array among its arguments;
    what reaches a block in another way, such as in an object, has no gradient: `probe` compares them.
    """
    if not on:
        yield
        return

    def call(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
        block = blocks[index]
        return _recomputed(block, own_call, args, kwargs) if block.training else own_call(*args, **kwargs)

    with stand_in(blocks, call):
        yield


def _recomputed(block: nn.Module, own_call: Callable, args: tuple, kwargs: dict) -> Any:
    arrays: list[mx.array] = []
    _map_inexact(arrays.append, (args, kwargs))

    def run(params: dict, arrays: list[mx.array]) -> Any:
        block.update(params)
        remaining = iter(arrays)
        own_args, own_kwargs = _map_inexact(lambda array: next(remaining), (args, kwargs))
        return own_call(*own_args, **own_kwargs)

    params = block.trainable_parameters()
    out = mx.checkpoint(run)(params, arrays)
    block.update(params)
    return out


def _map_inexact(function: Callable[[mx.array], Any], tree: Any) -> Any:
    """Apply `function` to the arrays of `tree` that may carry a gradient; integers, booleans and objects stay."""

    def apply(leaf: Any) -> Any:
        inexact = isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.inexact)
        return function(leaf) if inexact else leaf

    return tree_map(apply, tree, is_leaf=lambda leaf: isinstance(leaf, nn.Module))
