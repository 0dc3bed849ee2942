"""Supervised fine-tuning: the mean loss over the supervised tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from runner.backends.protocol import Backend, BackendBatch
from runner.models.lora import Params
from runner.training.evaluate import EvaluationResult, evaluate
from runner.training.methods.method import WeighedUpdate
from runner.training.train_state import TrainState
from runner.training.world import ALONE, World


class SupervisedMethod:
    """Implements `method.Method`: every supervised token has the same weight."""

    def __init__(self, backend: Backend, world: World = ALONE) -> None:
        self._backend, self._world = backend, world

    def weigh(self, state: TrainState, batches: Sequence[BackendBatch]) -> WeighedUpdate:
        """Return the batches as they are."""
        supervised, tokens = sum(batch.supervised for batch in batches), sum(batch.real_tokens for batch in batches)
        return WeighedUpdate(batches, supervised=supervised, tokens=tokens)

    def evaluate(
        self, params: Params, split: str, batches: Iterable[BackendBatch], before_batch: Callable[[], None]
    ) -> EvaluationResult:
        """Return the mean loss over the supervised tokens of `batches`."""
        return evaluate(self._backend, params, batches, before_batch, self._world)

    def identity(self, fingerprint: str) -> str:
        """Return the fingerprint of evaluated rows itself."""
        return fingerprint
