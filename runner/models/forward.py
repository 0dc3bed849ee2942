"""The forward pass in two parts, trunk and head, so that the head computes only the positions that are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn


class Forward:
    """Logits of selected positions. Splits the model where that gives the model's own logits, else runs it whole."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.split = self._head() is not None and self._agrees()

    def logits(self, inputs_BL: mx.array, positions_N: mx.array) -> mx.array:
        """Float32 logits (n, vocabulary) at `positions_N`, flat indices into (batch * length)."""
        if self.split:
            hidden_BLD = self.model.model(inputs_BL)
            head = self._head()
            assert head is not None
            return head(hidden_BLD.reshape(-1, hidden_BLD.shape[-1])[positions_N]).astype(mx.float32)
        logits_BLV = self.model(inputs_BL)
        return logits_BLV.reshape(-1, logits_BLV.shape[-1])[positions_N].astype(mx.float32)

    def _head(self) -> Callable[[mx.array], mx.array] | None:
        trunk = getattr(self.model, "model", None)
        if not isinstance(trunk, nn.Module):
            return None
        if isinstance(getattr(self.model, "lm_head", None), nn.Module):
            return self.model.lm_head
        embedding = getattr(trunk, "embed_tokens", None)
        return getattr(embedding, "as_linear", None)

    def _agrees(self) -> bool:
        """Whether trunk and head give the model's own logits on a probe: some families scale or cap them."""
        probe_BL = mx.arange(8)[None] + 1
        head = self._head()
        assert head is not None
        try:
            ours, own = head(self.model.model(probe_BL)), self.model(probe_BL)
        except (TypeError, AttributeError, ValueError):
            return False
        if ours.shape != own.shape:
            return False
        ours, own = ours.astype(mx.float32), own.astype(mx.float32)
        return bool((mx.abs(ours - own).max() <= 1e-3 * mx.maximum(mx.abs(own).max(), 1e-6)).item())


@contextmanager
def checkpointed(blocks: list[nn.Module], on: bool = True) -> Iterator[None]:
    """Recompute each block's activations in the backward pass, inside this context only.

    Each block gets a class of its own for the while; the model's class is never touched.
    """
    if not on:
        yield
        return
    own = [type(block) for block in blocks]
    try:
        for block, cls in zip(blocks, own, strict=True):
            block.__class__ = type(cls.__name__, (cls,), {"__call__": _recomputing(cls)})
        yield
    finally:
        for block, cls in zip(blocks, own, strict=True):
            block.__class__ = cls


def _recomputing(cls: type) -> Callable[..., mx.array]:
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

    return call
