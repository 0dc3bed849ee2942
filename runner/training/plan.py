"""What is due after an update: a pure function of the step and the plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingPlan:
    """When things happen, in updates."""

    iters: int
    report_every: int
    eval_every: int
    evaluates: bool
    """Whether there is a validation set."""
    stop_at: int | None = None
    patience: int | None = None
    min_delta: float = 0.0


def is_report_due(step: int, plan: TrainingPlan) -> bool:
    """Whether the training loss is reported after `step`."""
    return step % plan.report_every == 0 or step == plan.iters


def is_evaluation_due(step: int, plan: TrainingPlan) -> bool:
    """Whether an evaluation follows `step`: every `eval_every` updates and at the end."""
    return plan.evaluates and (step % plan.eval_every == 0 or step == plan.iters)


def is_better(loss: float, best: float | None, min_delta: float = 0.0) -> bool:
    """Whether `loss` beats `best` by more than `min_delta`; the first one does."""
    return best is None or loss < best - min_delta


def is_out_of_patience(bad_evaluations: int, plan: TrainingPlan) -> bool:
    """Whether the patience is used up."""
    return plan.patience is not None and bad_evaluations >= plan.patience
