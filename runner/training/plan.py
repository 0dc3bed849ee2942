"""When a run reports, evaluates and stops: pure functions of its progress and its plan."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from runner.checkpoints.save_policy import StopReason
from runner.config.schema import TrainConfig


def evaluation_count(train: TrainConfig, iters: int) -> int:
    """Return how many evaluations a run of `iters` updates has, without that before the first update."""
    further = {step for step in train.eval_at if step < iters and step % train.eval_every}
    return -(-iters // train.eval_every) + len(further)


@dataclass(frozen=True)
class TrainingPlan:
    """How long a run trains and when it reports and evaluates, in updates."""

    iters: int
    report_every: int
    eval_every: int
    eval_at: frozenset[int]
    """Steps after which the run evaluates, too."""
    evaluates: bool
    """Whether there is a validation set."""
    stop_at: int | None = None
    patience: int | None = None
    """Consecutive bad evaluations that stop the run early."""
    min_delta: float = 0.0
    """An evaluation is bad unless the loss falls by more than this."""

    def is_report_due(self, step: int) -> bool:
        """Return whether the training loss is reported after `step`: every `report_every` updates and at the end."""
        return step % self.report_every == 0 or step == self.iters

    def is_evaluation_due(self, step: int) -> bool:
        """Return whether the run evaluates after `step`: every `eval_every` updates, at `eval_at` and at the end."""
        return self.evaluates and (step % self.eval_every == 0 or step in self.eval_at or step == self.iters)

    def stop_reason(self, step: int, bad_evaluations: int, received: signal.Signals | None = None) -> StopReason | None:
        """Return why the run ends after `step`, or None if it continues; a signal takes precedence."""
        if received is not None:
            return StopReason(received.name)
        if step >= self.iters:
            return StopReason.FINISHED
        if self.patience is not None and bad_evaluations >= self.patience:
            return StopReason.EARLY_STOPPING
        if self.stop_at is not None and step >= self.stop_at:
            return StopReason.STOP_AT
        return None
