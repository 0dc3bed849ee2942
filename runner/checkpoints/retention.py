"""Which checkpoints are retained, and which one is the best: pure functions of steps, metrics and policy.

Order is by step, never by time. Of equal metrics the earlier step is better; a metric that is missing or not finite is
never the best; the newest checkpoint is always retained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

from runner.checkpoints.manifest import CheckpointManifest
from runner.checkpoints.save_policy import is_scheduled


class Evaluated(Protocol):
    """A checkpoint, however it is described."""

    @property
    def step(self) -> int: ...
    @property
    def valid_loss(self) -> float | None:
        """The validation loss at its step; None if it was not evaluated there, or is not finite."""


EvaluatedT = TypeVar("EvaluatedT", bound=Evaluated)


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
        # A negative count would become a slice from the end: everything but that many would be retained.
        assert self.keep_last >= 0 and self.keep_best >= 0
        assert self.keep_every is None or self.keep_every >= 1


def select_retained(
    checkpoints: Sequence[CheckpointManifest], policy: RetentionPolicy, *, source: int | None = None
) -> dict[int, list[RetentionReason]]:
    """Return the steps to retain, in order, each with its reasons; the order of `checkpoints` does not matter.

    Args:
        source: the step that the run was resumed from; it need not be there any more.

    Raises:
        ValueError: a step appears twice.
    """
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    if len(set(steps)) != len(steps):
        raise ValueError("a step appears twice among the saved checkpoints")
    scheduled = sorted(c.step for c in checkpoints if is_scheduled(c.save_reasons))
    every = policy.keep_every
    selected: dict[RetentionReason, Collection[int | None]] = {
        RetentionReason.NEWEST: steps[-1:],
        RetentionReason.LAST: scheduled[max(0, len(scheduled) - policy.keep_last) :],
        RetentionReason.BEST: [checkpoint.step for checkpoint in rank_checkpoints(checkpoints)[: policy.keep_best]],
        RetentionReason.EVERY: [step for step in steps if step % every == 0] if every is not None else [],
        RetentionReason.SOURCE: [source],
    }
    retained = {step: [reason for reason, chosen in selected.items() if step in chosen] for step in steps}
    return {step: reasons for step, reasons in retained.items() if reasons}


def select_mirrored(retained: Mapping[int, Collection[RetentionReason]], ends: Collection[int]) -> list[int]:
    """Return the steps of `select_retained` that a backup holds: the best, every `keep_every`, and where the run ended.

    Args:
        ends: the steps that were saved because the loop ended there. Without any of these, the newest is mirrored.
    """
    worth = {RetentionReason.BEST, RetentionReason.EVERY}
    mirrored = [step for step, reasons in retained.items() if step in ends or worth.intersection(reasons)]
    return sorted(mirrored) or sorted(retained)[-1:]


def best_checkpoint(checkpoints: Iterable[EvaluatedT]) -> EvaluatedT | None:
    """Return the checkpoint of the lowest validation loss; None if none was evaluated at its step."""
    return next(iter(rank_checkpoints(checkpoints)), None)


def rank_checkpoints(checkpoints: Iterable[EvaluatedT]) -> list[EvaluatedT]:
    """Return the checkpoints that have a validation loss, the best first."""
    losses = [(loss, c.step, c) for c in checkpoints if (loss := c.valid_loss) is not None]
    return [checkpoint for _, _, checkpoint in sorted(losses, key=lambda entry: entry[:2])]
