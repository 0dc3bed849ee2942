"""Validation and test loss: the same rows in the same order each time, no randomness, weighted by tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from runner.backends.protocol import Backend, BackendBatch
from runner.models.lora import Params


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


def evaluate(
    backend: Backend, params: Params, batches: Iterable[BackendBatch], before_batch: Callable[[], None] = lambda: None
) -> EvaluationResult:
    """Return the mean loss over `batches`; `before_batch` is called before each of them and may raise to stop."""
    start = time.perf_counter()
    loss_sum, supervised, tokens = 0.0, 0, 0
    for batch in batches:
        before_batch()
        loss_sum += backend.loss(params, batch)
        supervised += batch.supervised
        tokens += batch.real_tokens
    return EvaluationResult(loss_sum / max(1, supervised), supervised, tokens, time.perf_counter() - start)
