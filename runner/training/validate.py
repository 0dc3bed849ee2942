"""Validation and test loss: the same rows in the same order each time, no randomness, token-weighted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten

from runner.backends.cpu.block import view
from runner.models.forward import Forward
from runner.training.dataloader import DeviceBatch
from runner.training.loss import loss_sum


@dataclass(frozen=True)
class ValidationResult:
    """The result of one pass."""

    loss: float
    """Mean over supervised tokens."""
    supervised: int
    tokens: int
    """Real tokens, no padding."""
    seconds: float


def validate(
    model: nn.Module,
    forward: Forward,
    batches: Iterable[DeviceBatch],
    each: Callable[[], None] = lambda: None,
) -> ValidationResult:
    """The mean loss of the model as it is over `batches`; `each` is called before every batch and may raise."""
    begun = time.perf_counter()
    model.eval()
    total, supervised, tokens = 0.0, 0, 0
    params = {name: view(array) for name, array in tree_flatten(model.trainable_parameters())} if forward.engine else {}
    for ready in batches:
        each()
        if forward.engine is not None:
            total += forward.engine.loss(params, *ready.numbers())
        else:
            total += float(view(loss_sum(forward, *ready.arrays())))
        supervised += ready.batch.supervised
        tokens += ready.batch.real_tokens
    return ValidationResult(total / max(1, supervised), supervised, tokens, time.perf_counter() - begun)
