"""Which checkpoints are retained, and which one is the best: pure functions of steps, metrics and policy.

Order is by step, never by time. Of equal metrics the earlier step is better; a metric that is missing or not finite is
never the best; the newest checkpoint is always retained.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

from runner.checkpoints.save_policy import parse_save_reasons
from runner.runs.layout import BEST_METRIC


class RetentionReason(Enum):
    """Why a checkpoint is retained."""

    NEWEST = "newest"
    LAST = "last"
    BEST = "best"
    EVERY = "every"
    SOURCE = "resumed from"


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Retain the last `keep_last` scheduled saves, the `keep_best` best, and the multiples of `keep_every`."""

    keep_last: int
    keep_best: int
    keep_every: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a negative count or an interval below 1."""
        if self.keep_last < 0 or self.keep_best < 0:
            raise ValueError("keep_last and keep_best are invalid: must be 0 or more checkpoints")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError("keep_every is invalid: must be 1 or more updates")


class Saved(Protocol):
    """What this module reads of a checkpoint: a CheckpointRecord or a CheckpointManifest."""

    @property
    def step(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def why(self) -> tuple[str, ...]: ...


SavedT = TypeVar("SavedT", bound=Saved)


@dataclass(frozen=True, slots=True)
class SavedStep:
    """One checkpoint: whether an interval asked for it, and its metric if it was evaluated at its step."""

    step: int
    scheduled: bool
    metric: float | None = None

    @classmethod
    def of(cls, checkpoint: Saved) -> SavedStep:
        """Return what retention needs to know of `checkpoint`."""
        scheduled = any(reason.is_scheduled for reason in parse_save_reasons(checkpoint.why))
        return cls(checkpoint.step, scheduled, valid_loss(checkpoint))


def select_retained(
    saved: Sequence[SavedStep], policy: RetentionPolicy, *, source: int | None = None
) -> dict[int, list[RetentionReason]]:
    """Return the steps to retain, in order, each with its reasons; the order of `saved` does not matter.

    Args:
        source: the step that the run was resumed from; it need not be there any more.

    Raises:
        ValueError: a step appears twice.
    """
    by_step = {checkpoint.step: checkpoint for checkpoint in saved}
    if len(by_step) != len(saved):
        raise ValueError("a step appears twice among the saved checkpoints")
    steps = sorted(by_step)
    scheduled = [step for step in steps if by_step[step].scheduled]
    every = policy.keep_every
    selected: dict[RetentionReason, Collection[int | None]] = {
        RetentionReason.NEWEST: steps[-1:],
        RetentionReason.LAST: scheduled[max(0, len(scheduled) - policy.keep_last) :],
        RetentionReason.BEST: _ranked(saved)[: policy.keep_best],
        RetentionReason.EVERY: [step for step in steps if step % every == 0] if every is not None else [],
        RetentionReason.SOURCE: [source],
    }
    reasons = {step: [reason for reason, chosen in selected.items() if step in chosen] for step in steps}
    return {step: why for step, why in reasons.items() if why}


def select_mirrored(retained: Mapping[int, Collection[RetentionReason]], ends: Collection[int]) -> list[int]:
    """Return the steps of `select_retained` that a backup holds: the best, every `keep_every`, and where the run ended.

    Args:
        ends: the steps that were saved because the loop ended there. Without any of these, the newest is mirrored.
    """
    worth = {RetentionReason.BEST, RetentionReason.EVERY}
    mirrored = [step for step, reasons in retained.items() if step in ends or worth.intersection(reasons)]
    return sorted(mirrored) or sorted(retained)[-1:]


def best_checkpoint(checkpoints: Iterable[SavedT]) -> SavedT | None:
    """Return the checkpoint of the lowest validation loss; None if none was evaluated at its step."""
    by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    ranked = _ranked([SavedStep.of(checkpoint) for checkpoint in by_step.values()])
    return by_step[ranked[0]] if ranked else None


def valid_loss(checkpoint: Saved) -> float | None:
    """Return the validation loss at the step of `checkpoint`; None if it was not evaluated there, or is not finite."""
    loss = checkpoint.metrics.get(BEST_METRIC, math.nan)
    return loss if math.isfinite(loss) else None


def _ranked(saved: Iterable[SavedStep]) -> list[int]:
    measured = [(s.metric, s.step) for s in saved if s.metric is not None and math.isfinite(s.metric)]
    return [step for _, step in sorted(measured)]
