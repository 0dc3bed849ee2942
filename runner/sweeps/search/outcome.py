"""What a trial was measured to have, from the directory of its job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runner.checkpoints.save_policy import StopReason
from runner.common.safe_json import finite_number
from runner.config.labels import NO_LABELS
from runner.runs.directory import RunDirectory
from runner.runs.inspect import read_run
from runner.runs.objective import Objective
from runner.runs.rows import count_or_none
from runner.runs.search_record import DIVERGED, FAILED, FINISHED, PAUSED, Result


@dataclass(frozen=True)
class Outcome:
    """A result, and whether another start may give another one."""

    result: Result
    interrupted: bool = False
    """Whether its process ended without a reason of its own: it can continue."""


def read_outcome(folder: Path, step: int, objective: Objective, *, is_last: bool) -> Outcome:
    """Return what the job in `folder`, which was to train to `step`, has there.

    Args:
        folder: directory of the job.
        step: a rung.
        objective: the metrics of the search.
        is_last: whether `step` is the end of the trial.
    """
    run = read_run(folder, NO_LABELS)
    reached = run.step or 0
    if run.state == "diverged":
        return Outcome(Result(reached, (), DIVERGED, reason=run.reason or ""))
    losses = dict(run.losses("valid"))
    if run.state == "finished":
        values = objective.values(run)
        missing = [name for name, value in zip(objective.metrics, values, strict=True) if value is None]
        if missing:
            return _failed(reached, f"it has no {missing[0]}")
        measured = tuple(value for value in values if value is not None)
        return Outcome(Result(reached, measured, FINISHED, losses.get(reached, run.best_loss)))
    if run.state == "stopped" and reached >= step and not is_last:
        loss = losses.get(step)
        if loss is None:
            # A stop signal abandons an evaluation, for which the next start makes up.
            by_signal = run.reason != StopReason.STOP_AT.value
            return _failed(reached, f"it has no validation loss at step {step}", interrupted=by_signal)
        return Outcome(Result(step, (loss,), PAUSED, loss))
    return _failed(reached, run.reason or run.problem or run.state, interrupted=run.state != "failed")


def _failed(step: int, reason: str, *, interrupted: bool = False) -> Outcome:
    return Outcome(Result(step, (), FAILED, reason=reason), interrupted)


class Progress(NamedTuple):
    """How far a run is."""

    updates: int
    seconds: float
    """Wall time of the run over all its resumes."""

    def __sub__(self, before: Progress) -> Progress:
        return Progress(max(0, self.updates - before.updates), max(0.0, self.seconds - before.seconds))


def read_progress(folder: Path) -> Progress:
    """Return how far the run in `folder` is; nowhere where none has begun."""
    status = RunDirectory(folder).read_status()
    return Progress(count_or_none(status.get("step")) or 0, finite_number(status.get("seconds")) or 0.0)
