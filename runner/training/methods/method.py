"""The seam between the training loop and a method of training.

A method is a function of the log-probabilities of an update's supervised tokens. By the chain rule, the gradient of
such a function is that of a weighted sum of the tokens' losses, whose weights are its derivatives by the
log-probabilities (Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021, do the
same with representations). So a method only weighs the tokens; every backend differentiates weighted sums already, in
micro-batches of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runner.backends.protocol import BackendBatch
from runner.models.lora import Params
from runner.training.evaluate import EvaluationResult
from runner.training.train_state import Measures, TrainState


@dataclass(frozen=True)
class WeighedUpdate:
    """The micro-batches of this rank's share of an update, their tokens weighted so that the sum of their losses over
    all ranks has the gradient of the method's loss; where `loss` is None, divided by the supervised tokens."""

    batches: Sequence[BackendBatch]
    supervised: int
    """Supervised tokens of the share."""
    tokens: int
    """Its tokens, without padding."""
    loss: float | None = None
    """The method's loss, the mean over the examples of all ranks; None where it is the mean over supervised tokens."""
    examples: int = 0
    """Examples of the mean; 0 where it is over tokens."""
    measures: Measures = field(default_factory=dict)


class Method(Protocol):
    """A method of training."""

    def weigh(self, state: TrainState, batches: Sequence[BackendBatch]) -> WeighedUpdate:
        """Return what the next update of `state` differentiates; `batches` are its micro-batches."""

    def evaluate(
        self,
        params: Params,
        split: str,
        batches: Iterable[BackendBatch],
        before_batch: Callable[[], None],
    ) -> EvaluationResult:
        """Return the loss of the adapter `params` over the batches of an evaluation on `split`.

        `before_batch` is called before each of them and may raise to stop.
        """

    def identity(self, fingerprint: str) -> str:
        """Return what identifies recorded losses of rows that have `fingerprint`: losses with the same identity can be
        compared."""
