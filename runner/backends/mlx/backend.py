"""Loss and gradients by MLX's own differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.backends.environment import common_environment
from runner.backends.mlx.loss import ChunkedLoss
from runner.backends.mlx.recompute import recomputed
from runner.backends.protocol import DeviceBatch
from runner.models.forward import Forward
from runner.models.lora import AdaptedModel, Params

_BITS = {mx.bfloat16: mx.uint16}
"""NumPy has no bfloat16: the hidden-state cache holds its bits."""


class MlxBackend:
    """Implements `runner.backends.protocol.Backend` for every model and device."""

    identity = None

    def __init__(
        self,
        adapted: AdaptedModel,
        forward: Forward,
        *,
        chunk: int,
        all_positions: bool = False,
        recompute: bool = False,
        compiled: bool = False,
        fallback_reason: str | None = None,
        blas: dict[str, Any] | None = None,
    ) -> None:
        """`chunk`, `all_positions`: see `ChunkedLoss`. `recompute` activations in the backward pass. `blas`: identity
        of the BLAS in use, for the numeric environment."""
        self.forward, self.fallback_reason = forward, fallback_reason
        self._adapted, self._recompute, self._blas = adapted, recompute, blas
        self._loss = ChunkedLoss(forward=forward, chunk=chunk, all_positions=all_positions)
        self._compiled = compiled
        self._differentiate = mx.compile(self._differentiated) if compiled else self._differentiated

    def numeric_environment(self) -> dict[str, Any]:
        """Return what the last digits depend on."""
        return {
            **common_environment(self.forward, self._blas),
            "engine": None,
            "compiled": self._compiled,
            "loss_piece": self._loss.chunk,
            "head": "all" if self._loss.all_positions else "supervised",
            # Older versions computed the cross-entropy of MLX's CPU backend in NumPy, and recorded it under this key.
            "cpu_ops": False,
        }

    def loss(self, params: Params, batch: DeviceBatch) -> float:
        """Return the summed loss, without dropout."""
        self._set_training(False)
        self._adapted.place(params)
        self._adapted.dropout.set_key(None)
        return float(self._loss(*self._arrays(batch)))

    def loss_and_grads(self, params: Params, batch: DeviceBatch, key: mx.array) -> tuple[mx.array, Params]:
        """Return the summed loss and its gradients by `params`, not evaluated."""
        self._set_training(True)
        loss, grads = self._differentiate(params, *self._arrays(batch), key)
        self._adapted.dropout.set_key(None)
        self._adapted.place(params)  # tracing left its own arrays in the model
        return loss, grads

    def hidden_below(self, inputs: np.ndarray) -> np.ndarray:
        """Return the hidden states at the cut."""
        self.forward.restore_below()
        hidden = self.forward.below(mx.array(inputs))
        return np.array(hidden.view(_BITS.get(hidden.dtype, hidden.dtype)), copy=False)

    def release_frozen_weights(self, reload: Callable[[], nn.Module]) -> int:
        """Free the weights below the cut and return their bytes."""
        return self.forward.release_below(reload)

    def _differentiated(
        self,
        params: Params,
        inputs: mx.array,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        key: mx.array,
    ) -> tuple[mx.array, Params]:
        self._adapted.dropout.set_key(key)
        with recomputed(self._adapted.model.layers, self._recompute):
            return self._loss.with_grads(self._adapted.place, params, inputs, positions, targets, weights)

    def _arrays(self, batch: DeviceBatch) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return inputs (token ids or hidden states), positions, targets and weights."""
        b = batch.batch
        hidden = None if batch.hidden is None else mx.array(batch.hidden).view(self.forward.hidden_dtype)
        inputs = mx.array(b.inputs) if hidden is None else hidden
        return inputs, mx.array(b.positions), mx.array(b.targets), mx.array(b.weights)

    def _set_training(self, on: bool) -> None:
        if self._adapted.model.training != on:
            self._adapted.model.train(on)
