"""Loss and gradients by MLX's own differentiation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.backends.mlx.embedding_noise import EmbeddingNoise
from runner.backends.mlx.gradient_checkpointing import gradient_checkpointing
from runner.backends.mlx.loss import ChunkedLoss
from runner.backends.mlx.memory import checkpointed_step, step_memory
from runner.backends.numeric_environment import common_environment
from runner.backends.protocol import BackendBatch, RowLosses, StepMemory
from runner.models.lora import AdaptedModel, Params
from runner.models.split_model import SplitModel

_BITS = {mx.bfloat16: mx.uint16}
"""NumPy has no bfloat16: the hidden-state cache holds its bits."""


class MlxBackend:
    """Implements `runner.backends.protocol.Backend` for every model and device."""

    kernel_version = None
    uses_host_memory = False

    def __init__(
        self,
        adapted: AdaptedModel,
        split_model: SplitModel,
        *,
        chunk: int,
        all_positions: bool = False,
        grad_checkpoint: bool = False,
        compiled: bool = False,
        fallback_reason: str | None = None,
        embedding_noise: EmbeddingNoise | None = None,
    ) -> None:
        """`chunk`, `all_positions`: see `ChunkedLoss`. `grad_checkpoint`: activations are recomputed backward."""
        self.split_model, self.fallback_reason = split_model, fallback_reason
        self._embedding_noise = embedding_noise
        self._adapted, self._grad_checkpoint = adapted, grad_checkpoint
        self._loss = ChunkedLoss(
            split_model=split_model, chunk=chunk, all_positions=all_positions, head_params=adapted.head_params
        )
        self._compiled = compiled
        self._step = mx.compile(self._loss_and_grads) if compiled else self._loss_and_grads

    def numeric_environment(self) -> dict[str, Any]:
        """Return what the last digits depend on."""
        return {
            **common_environment(self.split_model),
            "engine": None,
            "compiled": self._compiled,
            "loss_piece": self._loss.chunk,
            "head": "all" if self._loss.all_positions else "supervised",
            # Older versions computed the cross-entropy of MLX's CPU backend in NumPy, and recorded it under this key.
            "cpu_ops": False,
        }

    def row_losses(self, params: Params, batch: BackendBatch) -> RowLosses:
        """Return the summed loss and that of each row, without dropout."""
        self._set_training(False)
        self._adapted.place(params)
        self._adapted.dropout.set_key(None)
        total, losses = self._loss(*self._arrays(batch))
        by_token = np.array(losses)[: batch.supervised]
        return RowLosses(float(total), batch.batch.sums_by_row(by_token))

    def token_losses(self, params: Params, batch: BackendBatch, key: mx.array) -> np.ndarray:
        """Return the loss of each supervised token, with dropout."""
        self._set_training(True)
        self._adapted.place(params)
        self._adapted.dropout.set_key(key)
        _, losses = self._loss(*self._arrays(batch))
        self._adapted.dropout.set_key(None)
        return np.array(losses)[: batch.supervised]

    def loss_and_grads(self, params: Params, batch: BackendBatch, key: mx.array) -> tuple[mx.array, Params]:
        """Return the summed loss and its gradients by `params`, not evaluated."""
        self._set_training(True)
        lengths = mx.array(batch.batch.input_lengths.astype(np.float32)) if self._embedding_noise else None
        loss, grads = self._step(params, *self._arrays(batch), key, lengths)
        self._adapted.dropout.set_key(None)
        self._adapted.place(params)  # tracing left its own arrays in the model
        return loss, grads

    def run_frozen_blocks(self, inputs: np.ndarray) -> np.ndarray:
        """Return the hidden states after the frozen blocks."""
        self.split_model.reload_frozen_weights()
        hidden = self.split_model.run_frozen_blocks(mx.array(inputs))
        return np.array(hidden.view(_BITS.get(hidden.dtype, hidden.dtype)), copy=False)

    def update_memory(self, params: Params, batch: BackendBatch) -> StepMemory:
        """Return the peak memory of `loss_and_grads`; a compiled step is taken for one that is not."""

        def step(*arrays: Any) -> list[mx.array]:
            with self._noise(arrays[0]):
                if self._grad_checkpoint:
                    return checkpointed_step(self._adapted, self._loss, params, *arrays)
                loss, grads = self._loss.loss_and_grads(self._adapted.place, params, *arrays)
                return [loss, *grads.values()]

        self._set_training(True)
        self._adapted.dropout.set_key(mx.random.key(0))
        try:
            return step_memory(step, self._arrays(batch), self._adapted.model)
        finally:
            self._adapted.dropout.set_key(None)
            self._adapted.place(params)

    def evaluation_memory(self, params: Params, batch: BackendBatch) -> StepMemory:
        """Return the peak memory of `row_losses`."""
        self._set_training(False)
        self._adapted.place(params)
        return step_memory(self._loss.until_first_evaluation, self._arrays(batch), self._adapted.model)

    def frozen_memory(self, inputs: np.ndarray) -> StepMemory:
        """Return the peak memory of `run_frozen_blocks`."""
        run = self.split_model.run_frozen_blocks
        return step_memory(lambda ids: [run(ids)], [mx.array(inputs)], self._adapted.model)

    def free_frozen_weights(self, reload: Callable[[], nn.Module]) -> int:
        """Free the weights of the frozen blocks and return their bytes."""
        return self.split_model.free_frozen_weights(reload)

    def _loss_and_grads(
        self,
        params: Params,
        inputs: mx.array,
        states: mx.array | None,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        key: mx.array,
        lengths: mx.array | None,
    ) -> tuple[mx.array, Params]:
        self._adapted.dropout.set_key(key)
        checkpointing = gradient_checkpointing(self._adapted.model.layers, self._grad_checkpoint)
        with self._noise(inputs, lengths), checkpointing:
            return self._loss.loss_and_grads(self._adapted.place, params, inputs, states, positions, targets, weights)

    def _noise(self, inputs: mx.array, lengths: mx.array | None = None) -> AbstractContextManager[None]:
        return self._embedding_noise.applied(inputs, lengths) if self._embedding_noise else nullcontext()

    def _arrays(self, batch: BackendBatch) -> tuple[mx.array, mx.array | None, mx.array, mx.array, mx.array]:
        """Return token ids, hidden states or None, positions, targets and weights."""
        b = batch.batch
        states = None if batch.hidden is None else mx.array(batch.hidden).view(self.split_model.hidden_dtype)
        return mx.array(b.inputs), states, mx.array(b.positions), mx.array(b.targets), mx.array(b.weights)

    def _set_training(self, on: bool) -> None:
        if self._adapted.model.training != on:
            self._adapted.model.train(on)
