"""Loss and gradients by the hand-written engine for CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.backends.cpu.engine import MAX_POSITIONS, Engine, group_rows
from runner.backends.cpu.linear import as_numpy
from runner.backends.cpu.memory import buffer_sizes
from runner.backends.cpu.partitions import PackedBatch, PackedRows
from runner.backends.numeric_environment import common_environment
from runner.backends.protocol import BackendBatch, RowLosses, StepMemory
from runner.models.lora import Params
from runner.models.split_model import SplitModel


class CpuBackend:
    """Implements `runner.backends.protocol.Backend` for float32 models of the engine's architectures."""

    uses_host_memory = True

    def __init__(self, engine: Engine, split_model: SplitModel, *, fallback_reason: str | None = None) -> None:
        self.engine, self.split_model, self.fallback_reason = engine, split_model, fallback_reason

    @property
    def kernel_version(self) -> str:
        """Version of the engine and of the kernels it uses."""
        return self.engine.kernel_version

    def numeric_environment(self) -> dict[str, Any]:
        """Return what the last digits depend on."""
        return {
            **common_environment(self.split_model),
            "engine": self.kernel_version,
            "compiled": False,
            "loss_piece": self.engine.head.chunk,
            "head": "supervised",
        }

    def row_losses(self, params: Params, batch: BackendBatch) -> RowLosses:
        """Return the summed loss and that of each row."""
        total, by_token = self.engine.losses(_views(params), packed(batch))
        return RowLosses(total, batch.batch.sums_by_row(by_token))

    def token_losses(self, params: Params, batch: BackendBatch, key: mx.array) -> np.ndarray:
        """Return the loss of each supervised token; the engine has no dropout, so `key` is not used."""
        return self.engine.losses(_views(params), packed(batch))[1]

    def loss_and_grads(
        self, params: Params, batch: BackendBatch, key: mx.array
    ) -> tuple[mx.array, dict[str, np.ndarray]]:
        """Return the summed loss and its gradients by `params`; the engine has no dropout, so `key` is not used."""
        loss, grads = self.engine.loss_and_grads(_views(params), packed(batch))
        return mx.array(loss), grads

    def run_frozen_blocks(self, inputs: np.ndarray) -> np.ndarray:
        """Return the hidden states after the frozen blocks."""
        if self.split_model.reload_frozen_weights():
            self.engine.reload_frozen_weights(self.split_model.model)
        return self.engine.run_frozen_blocks(inputs)

    def update_memory(self, params: Params, batch: BackendBatch) -> StepMemory:
        """Return the memory of the buffers that `loss_and_grads` uses."""
        return self._memory(params, batch.batch.input_lengths, batch.supervised, cached=batch.hidden is not None)

    def evaluation_memory(self, params: Params, batch: BackendBatch) -> StepMemory:
        """Return the memory of the buffers that `row_losses` uses, which computes some rows at a time."""
        lengths = batch.batch.input_lengths
        cached, share = batch.hidden is not None, batch.supervised / max(1, int(lengths.sum()))
        groups = [lengths[group] for group in group_rows(list(lengths), MAX_POSITIONS)]
        largest = max(groups, key=lambda group: int(group.sum()))
        supervised = min(batch.supervised, math.ceil(int(largest.sum()) * share))
        return self._memory(params, largest, supervised, cached=cached, backward=False)

    def frozen_memory(self, inputs: np.ndarray) -> StepMemory:
        """Return the memory of the buffers that `run_frozen_blocks` uses."""
        return self._memory({}, np.full(len(inputs), inputs.shape[1]), 0, cached=False, backward=False, trained=False)

    def _memory(self, params: Params, lengths: np.ndarray, supervised: int, **options: bool) -> StepMemory:
        sizes = buffer_sizes(self.engine, params, lengths, supervised, **options)
        logits = sizes.pop("logits", 0)
        return StepMemory(activations=4 * sum(sizes.values()), logits=4 * logits)

    def free_frozen_weights(self, reload: Callable[[], nn.Module]) -> int:
        """Free the weights of the frozen blocks and return their bytes."""
        self.engine.free_frozen_weights()
        return self.split_model.free_frozen_weights(reload)


def packed(batch: BackendBatch) -> PackedBatch:
    """Return `batch` without its padding."""
    b = batch.batch
    real = np.arange(b.inputs.shape[1]) < b.input_lengths[:, None]
    packed_position = np.cumsum(real.reshape(-1)) - 1
    inputs = b.inputs if batch.hidden is None else batch.hidden
    return PackedBatch(inputs[real], PackedRows(b.input_lengths), packed_position[b.positions], b.targets, b.weights)


def _views(params: Params) -> dict[str, np.ndarray]:
    return {name: as_numpy(array) for name, array in params.items()}
