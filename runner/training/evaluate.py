"""Validation and test loss: the same rows in the same order each time, no randomness, weighted by tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from runner.backends.protocol import Backend, BackendBatch
from runner.models.lora import Params
from runner.training.signals import StopRequested
from runner.training.world import ALONE, World


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
    backend: Backend,
    params: Params,
    batches: Iterable[BackendBatch],
    before_batch: Callable[[], None] = lambda: None,
    world: World = ALONE,
) -> EvaluationResult:
    """Return the mean loss over `batches`; `before_batch` is called before each of them and may raise to stop.

    With several ranks `batches` are this one's share, dealt in turn, and the result is that of all: what one process
    computes, to the last digit, where the ranks compute alike.

    Raises:
        StopRequested: `before_batch` raised it, here or on another rank.
    """
    start = time.perf_counter()
    totals, supervised, tokens = [], [], []
    indices, losses, counts = [], [], []
    abandoned = False
    try:
        for batch in batches:
            before_batch()
            found = backend.row_losses(params, batch)
            totals.append(found.total)
            supervised.append(batch.supervised)
            tokens.append(batch.real_tokens)
            indices.append(batch.batch.rows)
            losses.append(found.rows)
            counts.append(batch.batch.supervised_by_row)
    except StopRequested:
        abandoned = True
    by_batch = world.gather_arrays(np.array(totals), np.array([supervised, tokens], np.int64), abandoned=abandoned)
    loss_sum = 0.0
    for total in _dealt(by_batch[0]).tolist():  # one after the other, as the sum of all Python versions is
        loss_sum += total
    by_row = world.gather_arrays(_joined(indices).astype(np.int64), _joined(losses), _joined(counts).astype(np.int64))
    # Batches hold rows of similar lengths.
    evaluated, row_losses, row_counts = (np.concatenate(arrays) for arrays in by_row)
    order = np.argsort(evaluated, kind="stable")
    rows = EvaluatedRows(evaluated[order], row_losses[order], row_counts[order])
    all_supervised, all_tokens = (
        np.concatenate([part.reshape(2, -1) for part in by_batch[1]], axis=1).sum(axis=1).tolist()
    )
    seconds = time.perf_counter() - start
    return EvaluationResult(loss_sum / max(1, all_supervised), all_supervised, all_tokens, seconds, rows)


def _dealt(parts: list[np.ndarray]) -> np.ndarray:
    """Return the values of all batches in order; `parts` has those of each rank, to which batches are dealt in turn."""
    joined = np.zeros(sum(map(len, parts)))
    for rank, part in enumerate(parts):
        joined[rank :: len(parts)] = part
    return joined


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)
