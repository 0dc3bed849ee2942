"""Dropout whose masks are a pure function of (seed, update, micro-batch, layer), and of the rank where there are
several."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import mlx.nn as nn


def dropout_seed(seed: int, update: int, micro_batch: int, rank: int = 0) -> int:
    """Return 64 bits that depend on the run's seed, the update, the micro-batch and the rank alone."""
    text = (f"dropout {seed} {update} {micro_batch}" + (f" {rank}" if rank else "")).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def dropout_key(seed: int, update: int, micro_batch: int, rank: int = 0) -> mx.array:
    """Return the MLX random key of a micro-batch's dropout masks: (2,) uint32, high and low word."""
    return mx.random.key(dropout_seed(seed, update, micro_batch, rank))


class DropoutKeys:
    """The keys of the current micro-batch, one for each dropout layer: (layers, 2) uint32."""

    def __init__(self) -> None:
        self.layers = 0
        self.keys: mx.array | None = None

    def set_key(self, key: mx.array | None) -> None:
        """Derive each layer's key from the micro-batch's `key`; None switches dropout off."""
        self.keys = mx.random.split(key, self.layers) if key is not None and self.layers else None


class KeyedDropout(nn.Module):
    """Dropout that takes its mask from a key, not from MLX's global random state.

    So the mask is the same when a block is recomputed in the backward pass, there is no random state to save, and an
    evaluation cannot disturb it.
    """

    def __init__(self, p: float, keys: DropoutKeys) -> None:
        """`keys` are shared by all layers of a model, and count them."""
        super().__init__()
        self._keep = 1.0 - p
        self._index = keys.layers
        self._keys = keys
        keys.layers += 1

    def __call__(self, x: mx.array) -> mx.array:
        """Zero elements of `x` (any shape) and scale the others by 1 / (1 - p), in training only."""
        if not self.training or self._keys.keys is None:
            return x
        mask = mx.random.bernoulli(self._keep, x.shape, key=self._keys.keys[self._index])
        return mask * x * (1.0 / self._keep)
