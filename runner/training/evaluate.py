"""Validation and test loss: the same rows in the same order each time, no randomness, weighted by tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from runner.backends.protocol import Backend, BackendBatch
from runner.models.lora import Params


@dataclass(frozen=True)
class EvaluatedRows:
    """What each row contributes to a loss, in the order of the data."""

    losses: np.ndarray
    """(rows,) float64: sum of -log p(target) over the supervised tokens of the row."""
    tokens: np.ndarray
    """(rows,) int64: supervised tokens of the row."""


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one pass over a split."""

    loss: float
    """Mean over supervised tokens."""
    supervised: int
    """Supervised tokens."""
    tokens: int
    """Real tokens, no padding."""
    seconds: float
    rows: EvaluatedRows


def evaluate(
    backend: Backend, params: Params, batches: Iterable[BackendBatch], before_batch: Callable[[], None] = lambda: None
) -> EvaluationResult:
    """Return the mean loss over `batches`; `before_batch` is called before each of them and may raise to stop."""
    start = time.perf_counter()
    loss_sum, supervised, tokens = 0.0, 0, 0
    indices, losses, counts = [], [], []
    for batch in batches:
        before_batch()
        found = backend.row_losses(params, batch)
        loss_sum += found.total
        supervised += batch.supervised
        tokens += batch.real_tokens
        indices.append(batch.batch.rows)
        losses.append(found.rows)
        counts.append(batch.batch.supervised_by_row)
    # Batches hold rows of similar lengths.
    order = np.argsort(_joined(indices), kind="stable")
    rows = EvaluatedRows(_joined(losses)[order], _joined(counts).astype(np.int64)[order])
    return EvaluationResult(loss_sum / max(1, supervised), supervised, tokens, time.perf_counter() - start, rows)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)
