"""The loop: every kind of run passes through it. Members share the batches; a plain run has one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.checkpoints.save_policy import SavePolicy
from runner.common.errors import Diverged
from runner.data.order import BatchOrder, DataPosition
from runner.models.forward import Forward
from runner.models.lora import AdaptedModel
from runner.reports.progress import Display
from runner.training import plan as events
from runner.training import state_files
from runner.training.baseline import Baseline
from runner.training.dataloader import DeviceBatch, FixedBatches, PrefetchingLoader
from runner.training.plan import TrainingPlan
from runner.training.signals import StopRequested, StopSignals
from runner.training.train_state import ReportWindow, TrainState
from runner.training.train_step import TrainStep
from runner.training.validate import validate

PATIENCE = 3.0
"""Seconds of silence before an evaluation says that it is at work."""
FINISHED, STOPPED_EARLY, STOP_AT = "finished", "early stopping", "stop_at"


@dataclass
class Trainer:
    """All that the loop works on."""

    plan: TrainingPlan
    saves: SavePolicy
    members: list[TrainState]
    position: DataPosition
    order: BatchOrder
    batches: PrefetchingLoader
    valid_batches: FixedBatches
    adapted: AdaptedModel
    forward: Forward
    step: TrainStep
    identity: state_files.RunIdentity
    baseline: Baseline
    stops: StopSignals
    display: Display


def train(job: Trainer) -> str:
    """Train every member from where it stands to the end, a stop or the end of patience; returns which it was.

    Raises:
        Diverged: a loss or gradient is not finite. StorageError: a save failed. What was saved before stays.
    """
    for member in job.members:
        evaluate_pending(job, member)
    ending = stop_reason(job)
    while ending is None:
        batches, job.position = job.batches.take(job.position)
        best = []
        for member in job.members:
            member.record.check()
            log_backup_news(job, member)
            update(job, member, batches)
            step = member.progress.step
            if events.is_report_due(step, job.plan):
                report(job, member)
            best.append(events.is_evaluation_due(step, job.plan) and evaluate(job, member))
        ending = stop_reason(job)  # asked once: what ends the loop is what the saves are told
        for member, is_best in zip(job.members, best, strict=True):
            save_if_due(job, member, is_best, ending)
    for member in job.members:
        member.record.settle()
    return ending


def log_backup_news(job: Trainer, member: TrainState) -> None:
    """Say what the backup has to say."""
    for line in member.record.backup.news() if member.record.backup else []:
        job.display.line(line, "yellow")


def stop_reason(job: Trainer) -> str | None:
    """Why the loop is over, or None: all members stand at the same step."""
    progress = job.members[0].progress
    if job.stops.signal is not None:
        return job.stops.signal.name
    if progress.step >= job.plan.iters:
        return FINISHED
    if all(events.is_out_of_patience(m.progress.bad_evaluations, job.plan) for m in job.members):
        return STOPPED_EARLY
    if job.plan.stop_at is not None and progress.step >= job.plan.stop_at:
        return STOP_AT
    return None


def evaluate_pending(job: Trainer, member: TrainState) -> None:
    """What comes before the next update: the evaluation of step 0, or one that a stop cut off."""
    progress = member.progress
    if job.stops.signal is not None:
        return
    if progress.pending_evaluation:
        progress.pending_evaluation = False
        best = evaluate(job, member)
        save_if_due(job, member, best, stop_reason(job))
    elif progress.step == 0 and job.plan.evaluates and progress.baseline_loss is None:
        evaluate(job, member)


def update(job: Trainer, member: TrainState, batches: Sequence[DeviceBatch]) -> None:
    """One update of `member`, counted in its progress."""
    begun = time.perf_counter()
    progress = member.progress
    rate = member.learning_rate(progress.step + 1)
    loss_sum, norm = job.step.learn(member, batches, rate)
    tokens = sum(ready.batch.real_tokens for ready in batches)
    supervised = sum(ready.batch.supervised for ready in batches)
    progress.step += 1
    progress.tokens += tokens
    window = progress.window
    window.loss_sum += loss_sum
    window.supervised += supervised
    window.tokens += tokens
    window.updates += 1
    window.grad_norm = norm
    member.train_seconds += time.perf_counter() - begun
    job.display.step(progress.step, loss_sum / supervised, tokens, time.perf_counter() - begun)


def report(job: Trainer, member: TrainState) -> None:
    """Write the training loss of the window: the mean over its supervised tokens."""
    progress, window = member.progress, member.progress.window
    progress.train_loss = window.loss_sum / window.supervised
    member.record.row(
        step=progress.step,
        split="train",
        loss=progress.train_loss,
        learning_rate=member.learning_rate(progress.step),
        grad_norm=window.grad_norm,
        epoch=epoch(job),
        tokens=progress.tokens,
        supervised_tokens=window.supervised,
        tokens_per_second=round(window.tokens / max(member.train_seconds, 1e-9), 1),
        peak_memory_gb=round(mx.get_peak_memory() / 1e9, 3),
    )
    member.record.status(state="running", step=progress.step, train_loss=progress.train_loss)
    job.display.train_loss(progress.step, progress.train_loss, member.learning_rate(progress.step))
    progress.window = ReportWindow()
    member.train_seconds = 0.0


def evaluate(job: Trainer, member: TrainState) -> bool:
    """Evaluate `member` where it stands; returns whether it is the best so far. A stop leaves it to the resume."""
    progress = member.progress
    job.step.place(member.params)
    try:
        known = job.baseline.evaluation if progress.step == 0 else None
        result = known or validate(job.adapted.model, job.forward, watched(job, progress.step), job.stops.check)
    except StopRequested:
        progress.pending_evaluation = progress.step > 0
        return False
    if not math.isfinite(result.loss):
        raise Diverged(f"The validation loss at step {progress.step} is not finite.")
    progress.valid_loss, progress.valid_step = result.loss, progress.step
    member.record.row(
        step=progress.step,
        split="valid",
        loss=result.loss,
        epoch=epoch(job),
        tokens=progress.tokens,
        supervised_tokens=result.supervised,
        tokens_per_second=round(result.tokens / max(result.seconds, 1e-9), 1),
        peak_memory_gb=round(mx.get_peak_memory() / 1e9, 3),
    )
    best = False
    if progress.step == 0:
        job.baseline.evaluated(result)
        progress.baseline_loss = result.loss
    else:
        if events.is_better(result.loss, progress.best_loss, job.plan.min_delta):
            progress.bad_evaluations = 0
        else:
            progress.bad_evaluations += 1
        best = events.is_better(result.loss, progress.best_loss)
        if best:
            progress.best_loss, progress.best_step = result.loss, progress.step
    member.record.status(state="running", step=progress.step, valid_loss=result.loss, best=best_of(member))
    job.display.valid_loss(progress.step, result.loss, best)
    return best


def watched(job: Trainer, step: int) -> Iterator[DeviceBatch]:
    """The batches of an evaluation; how far it is is shown, and said once where the one before training takes long."""
    begun, done, said, rows = time.monotonic(), 0, step > 0, job.valid_batches.rows
    for ready in job.valid_batches:
        job.display.busy(f"{step}/{job.plan.iters}  evaluating, {done}/{rows} rows")
        if not said and time.monotonic() - begun > PATIENCE:
            job.display.line(f"evaluating {rows:,} rows before training")
            said = True
        yield ready
        done += len(ready.batch.lengths)


def save_if_due(job: Trainer, member: TrainState, best: bool, ending: str | None) -> None:
    """Save after the evaluation of this step, once, if the schedule, a new best or the loop's `ending` asks for it."""
    progress = member.progress
    why = job.saves.due(
        progress.step,
        minutes_since_save=member.since_save.minutes(),
        best=best and member.record.policy.keep_best > 0,
        stopping=ending,
    )
    if not why:
        return
    evaluated = progress.valid_loss if progress.valid_step == progress.step else None
    files = state_files.checkpoint_files(
        member, job.position, job.order.window_batches, job.identity, job.adapted.adapter_config()
    )
    member.record.save(progress.step, files, why, evaluated)
    member.since_save.restart()


def epoch(job: Trainer) -> float:
    """Passes over the training rows so far, as a decimal."""
    return round(job.position.epoch + job.position.batch / job.order.batches_per_epoch, 4)


def best_of(member: TrainState) -> dict[str, float | int] | None:
    """The best evaluation so far, for status.json."""
    progress = member.progress
    if progress.best_step is None or progress.best_loss is None:
        return None
    return {"step": progress.best_step, "valid_loss": progress.best_loss}
