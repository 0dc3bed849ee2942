"""Gradient checkpointing of single blocks (Chen et al., "Training deep nets with sublinear memory cost", 2016)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def gradient_checkpointing(blocks: Sequence[nn.Module], on: bool = True) -> Iterator[None]:
    """Recompute each block's activations in the backward pass of what is traced inside this context.

    mlx-lm's `grad_checkpoint` replaces the method of the model's class for good; here each block gets a subclass for
    the time being.
    """
    if not on:
        yield
        return
    classes = [type(block) for block in blocks]
    try:
        for block, cls in zip(blocks, classes, strict=True):
            block.__class__ = _recomputing_class(cls)  # type: ignore[arg-type]
        yield
    finally:
        for block, cls in zip(blocks, classes, strict=True):
            block.__class__ = cls


@cache
def _recomputing_class(cls: Any) -> Any:
    """Return a subclass of `cls` that keeps no activations in training but computes them again."""

    def call(self: nn.Module, x: mx.array, *args: object, **kwargs: object) -> mx.array:
        if not self.training:
            return cls.__call__(self, x, *args, **kwargs)

        def block(params: dict, x: mx.array) -> mx.array:
            self.update(params)
            return cls.__call__(self, x, *args, **kwargs)

        params = self.trainable_parameters()
        out = mx.checkpoint(block)(params, x)
        self.update(params)
        return out

    return type(cls.__name__, (cls,), {"__call__": call})
