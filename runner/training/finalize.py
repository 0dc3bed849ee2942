"""What comes after the loop, and what is generated before and after it: samples, test loss, result, summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from runner.checkpoints.mirror import BackupMirror
from runner.checkpoints.store import step_name
from runner.common.clock import utc_now
from runner.config import schema
from runner.config.schema import Config
from runner.data.metrics import metric_named
from runner.reports import next_commands, run_summary
from runner.runs.inspect import RunInfo
from runner.runs.run_spec import RunSpec
from runner.training import state_files
from runner.training.components import Components
from runner.training.feeding import fixed_batches
from runner.training.generate import generate
from runner.training.run_writer import rows_of_step
from runner.training.signals import StopRequested, StopSignals
from runner.training.trainer import FINISHED, STOPPED_EARLY, Trainer, best_of
from runner.training.validate import validate

_PATIENCE = 2.0  # seconds that a backup may take without a word


def generate_samples(job: Trainer, parts: Components, settings: Config, *, before: bool) -> None:
    """Generate the held-out rows and score them: before the first update, or with the result."""
    member, wanted = job.members[0], settings.data.metric_rows
    if not wanted or settings.data.metric is None or (before and member.progress.step > 0) or job.stops.signal:
        return
    split = settings.data.metric_split
    rows = [row.value for row in parts.data.rows[split].first(wanted)]
    job.step.place(member.params)
    try:
        known = job.baseline.generation if before else None
        if known is None:
            job.display.line(f"generating {len(rows)} {split} rows {'before' if before else 'after'} training")
        made = known or generate(
            parts.adapted.model,
            parts.base.tokenizer,
            rows,
            parts.options,
            metric_named(settings.data.metric),
            max_tokens=settings.data.max_new_tokens,
            each=job.stops.check,
        )
    except StopRequested:
        return
    if before:
        job.baseline.generation = made
    step = member.progress.step
    for answer in made.answers:
        member.record.samples.append({"step": step, **vars(answer)})
    member.record.row(
        step=step,
        split=split,
        metric=settings.data.metric,
        score=made.score,
        rows=len(rows),
        generated_tokens=made.tokens,
    )


def finalize(job: Trainer, parts: Components, start: RunSpec, ending: str) -> None:
    """Write adapters/, the last rows and the status, and say what came of the run."""
    member, settings, record = job.members[0], start.config, job.members[0].record
    progress = member.progress
    finished = ending in (FINISHED, STOPPED_EARLY)
    result = record.result_step(settings.checkpoint.result)
    if result is not None:
        record.write_result(result)
    lines: list[str] = []
    if finished:
        lines = _final_rows(job, parts, settings, result)
    if job.stops.signal is not None:  # also a stop that came while the last answers were generated
        finished, ending = False, job.stops.signal.name
    record.end_rows()
    named = finished and ending != FINISHED
    record.status(
        state="finished" if finished else "stopped",
        step=progress.step,
        reason=ending if named or not finished else None,
        result_step=result,
        best=best_of(member),
        seconds=round(record.seconds(), 1),
        ended=utc_now(),
    )
    if record.backup:
        for line in finish_backup(record.backup, job.stops, job.display.line):
            job.display.line(line, "yellow")
    for line in lines:
        job.display.line(line)
    state_now = "finished" if finished else "stopped"
    loss = "" if progress.best_loss is None else f"valid loss {progress.best_loss:.4f}"
    job.display.job_line(f"{state_now:<9} {progress.step:>6}/{settings.train.iters}  {loss}")
    job.display.line("")
    run = RunInfo(path=start.directory.path, state=state_now, settings=schema.flatten_dict(start.stored))
    for line in run_summary.summary_lines(
        start.directory.path,
        state=state_now,
        reason=ending if named or not finished else "finished",
        step=progress.step,
        iters=settings.train.iters,
        seconds=record.seconds(),
        tokens=progress.tokens,
        baseline=progress.baseline_loss,
        best=best_of(member),
        result_step=result,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
        commands=next_commands.after_run(run, has_result=result is not None),
    ):
        job.display.line(line)


def finish_backup(backup: BackupMirror, stops: StopSignals, say: Callable[[str], None] = print) -> list[str]:
    """Wait until the backup has all that it should have, or a signal comes; what a person should know of it."""
    asked, begun, told = stops.signal, time.monotonic(), False

    def waiting() -> bool:
        nonlocal told
        if not told and time.monotonic() - begun > _PATIENCE:
            told = True
            say(f"waiting for the backup in {backup.root}; Ctrl-C leaves it behind, and resume= catches it up")
        return stops.signal is asked

    done = backup.finish(waiting)
    news = backup.news()
    if done:
        return [*news, f"mirrored to {backup.folder}"]
    return [*news, f"backup: behind; resume= this run to catch up: {backup.problem or 'not waited for'}"]


def _final_rows(job: Trainer, parts: Components, settings: Config, result: int | None) -> list[str]:
    """Test loss and generated answers of the result, where they are asked for."""
    member = job.members[0]
    if result is not None:
        loaded = member.record.store.load(member.record.store.folder / step_name(result))
        member.params = state_files.read_state(loaded).params
    lines = []
    step = member.progress.step
    if settings.train.test:
        job.step.place(member.params)
        batches = fixed_batches(parts.data.test, settings, parts.caches)
        tested = validate(parts.adapted.model, job.forward, batches)
        member.record.row(
            step=step,
            split="test",
            loss=tested.loss,
            perplexity=math.exp(min(tested.loss, 700)),
            of_step=result,
        )
        lines.append(f"test loss {tested.loss:.4f}, perplexity {math.exp(min(tested.loss, 700)):.3f}")
    if settings.data.metric_rows and settings.data.metric:
        generate_samples(job, parts, settings, before=False)
        before = rows_of_step(member.record.directory.samples, 0)
        after = rows_of_step(member.record.directory.samples, step)
        if after:
            picked = run_summary.select_samples(before, after)
            lines += run_summary.score_lines(
                settings.data.metric,
                len(after),
                float(np.mean([row["score"] for row in before.values()])) if before else None,
                float(np.mean([row["score"] for row in after.values()])),
                [(before.get(row), after[row]) for row in picked],
            )
    return lines
