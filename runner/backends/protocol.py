"""The seam between training and what computes a model's loss and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.data.batch import Batch
from runner.models.lora import Params
from runner.models.split_model import SplitModel

Gradients = Mapping[str, mx.array] | Mapping[str, np.ndarray]
"""Gradients by parameter name, in the array type that the backend computes with."""


@dataclass(frozen=True, slots=True)
class BackendBatch:
    """A batch in NumPy, as every backend accepts it; each converts it to its own arrays."""

    batch: Batch
    hidden: np.ndarray | None = None
    """Hidden states (batch, length, hidden_size) after the frozen blocks, as the hidden-state cache holds them
    (bfloat16 as uint16); None where the frozen blocks have to be computed from `batch.inputs`."""

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return self.batch.supervised

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return len(self.batch.input_lengths)

    @property
    def real_tokens(self) -> int:
        """Number of tokens without padding."""
        return self.batch.real_tokens

    def weighted(self, weights: np.ndarray) -> BackendBatch:
        """Return the batch with `weights`, (supervised,), for its supervised tokens."""
        return replace(self, batch=self.batch.weighted(weights))

    def without_unweighted_rows(self) -> BackendBatch | None:
        """Return the batch without rows of which all weights are zero; None if none is left."""
        weighted = np.flatnonzero(self.batch.sums_by_row(np.abs(self.batch.weights[: self.supervised])))
        if len(weighted) == self.row_count:
            return self
        if not len(weighted):
            return None
        hidden = None if self.hidden is None else self.hidden[weighted]
        return BackendBatch(self.batch.select_rows(weighted), hidden)


@dataclass(frozen=True, slots=True)
class RowLosses:
    """The loss of a batch, and of each of its rows."""

    total: float
    """Sum of -log p(target) over the supervised tokens, added up in float32 as `Backend.loss_and_grads` does."""
    rows: np.ndarray
    """(batch,) float64: that sum for each row."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that a step takes at its peak, beyond the weights, the adapter and the optimizer."""

    activations: int
    """What the backward pass reads, gradients and temporary arrays."""
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.logits


class Backend(Protocol):
    """Loss, gradients and hidden states of the frozen blocks of one adapted model."""

    split_model: SplitModel
    """How the model is split."""
    fallback_reason: str | None
    """Why a faster way to compute is not used, for one line of the log; None where nothing is lost."""

    uses_host_memory: bool
    """Whether what it allocates is outside of MLX's own count of memory."""

    @property
    def kernel_version(self) -> str | None:
        """Version of hand-written kernels, on which the last digits depend; None where MLX computes."""

    def numeric_environment(self) -> dict[str, Any]:
        """Everything that the last digits depend on beside the run's settings; stored in each checkpoint."""

    def row_losses(self, params: Params, batch: BackendBatch) -> RowLosses:
        """Return the sum of -log p(target) over the supervised tokens of each row of `batch`, without dropout."""

    def token_losses(self, params: Params, batch: BackendBatch, key: mx.array) -> np.ndarray:
        """Return -log p(target) of each supervised token, (supervised,) float32, as `loss_and_grads` computes it: with
        the dropout masks of `key`."""

    def loss_and_grads(self, params: Params, batch: BackendBatch, key: mx.array) -> tuple[mx.array, Gradients]:
        """Return the loss summed with the weights of `batch`, a scalar, and its gradients by `params`; MLX arrays may
        not be evaluated yet.

        `key` decides the dropout masks of this micro-batch.
        """

    def run_frozen_blocks(self, inputs: np.ndarray) -> np.ndarray:
        """Return the hidden states (batch, length, hidden_size) after the frozen blocks for token ids (batch, length),
        as `BackendBatch.hidden` holds them.

        Weights that were freed are loaded again first.
        """

    def update_memory(self, params: Params, batch: BackendBatch) -> StepMemory:
        """Return the peak memory of `loss_and_grads` for a batch of these shapes; nothing is computed."""

    def evaluation_memory(self, params: Params, batch: BackendBatch) -> StepMemory:
        """Return the peak memory of `row_losses` for a batch of these shapes; nothing is computed."""

    def frozen_memory(self, inputs: np.ndarray) -> StepMemory:
        """Return the peak memory of `run_frozen_blocks` for inputs of this shape; nothing is computed."""

    def free_frozen_weights(self, reload: Callable[[], nn.Module]) -> int:
        """Free the weights of the frozen blocks and return their bytes; `reload` loads the base again, should
        `run_frozen_blocks` need them."""
