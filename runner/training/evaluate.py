"""Validation and test loss: the same rows in the same order each time, no randomness, weighted by tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from runner.backends.protocol import Backend, BackendBatch
from runner.models.lora import Params


@dataclass(frozen=True)
class EvaluatedRows:
    """What each row contributes to a loss, in the order of the data."""

    indices: np.ndarray
    """(rows,) int64: which rows of the split they are."""
    losses: np.ndarray
    """(rows,) float64: sum of -log p(target) over the supervised tokens of the row; of a method that compares answers,
    its loss of the example."""
    tokens: np.ndarray
    """(rows,) int64: supervised tokens of the row; 1 where its loss is no sum."""


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one pass over a split."""

    loss: float
    """Mean over supervised tokens, or over the examples of a method that compares answers."""
    supervised: int
    """Supervised tokens."""
    tokens: int
    """Real tokens, no padding."""
    seconds: float
    rows: EvaluatedRows
    measures: dict[str, float] = field(default_factory=dict)
    """What the method measures beside the loss, such as the accuracy of the rewards."""


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
    evaluated = _joined(indices).astype(np.int64)
    order = np.argsort(evaluated, kind="stable")
    rows = EvaluatedRows(evaluated[order], _joined(losses)[order], _joined(counts).astype(np.int64)[order])
    return EvaluationResult(loss_sum / max(1, supervised), supervised, tokens, time.perf_counter() - start, rows)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)
