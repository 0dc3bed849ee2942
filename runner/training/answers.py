"""Answers to held-out rows before and after training: generated, written to samples.jsonl and compared."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from runner.config.schema import Config
from runner.models.lora import Params
from runner.reports import run_summary
from runner.runs.rows import read_rows
from runner.training.generate import GenerationResult, answer_rows
from runner.training.signals import StopRequested
from runner.training.trainer import Trainer


def record_answers_before_training(trainer: Trainer, config: Config) -> None:
    """Record the base model's answers at step 0, if answers are configured; those of an earlier job are reused.

    A stop signal abandons them: the run stops before its first update, and its resume generates them.
    """
    if not config.data.metric_rows or trainer.state.progress.step > 0 or trainer.stops.requested is not None:
        return
    baseline = trainer.components.baseline
    with suppress(StopRequested):
        if baseline.generation is None:
            baseline.generation = _generate(trainer, trainer.state.params, config, "before")
        _record(trainer, config, baseline.generation)


def record_answers_after_training(trainer: Trainer, params: Params, config: Config) -> None:
    """Record the answers of the result, whose weights are `params`.

    Raises:
        StopRequested: a stop signal arrived.
    """
    _record(trainer, config, _generate(trainer, params, config, "after"))


def compare_answers(trainer: Trainer, metric: str) -> list[str]:
    """Return lines that compare the answers after training with those before it."""
    file = trainer.writer.directory.samples
    before, after = _samples_of_step(file, 0), _samples_of_step(file, trainer.state.progress.step)
    return run_summary.score_lines(
        metric,
        len(after),
        float(np.mean([row["score"] for row in before.values()])) if before else None,
        float(np.mean([row["score"] for row in after.values()])),
        [(before.get(row), after[row]) for row in run_summary.select_samples(before, after)],
    )


def _generate(trainer: Trainer, params: Params, config: Config, when: str) -> GenerationResult:
    components, data = trainer.components, config.data
    rows = components.data.first_rows(data.metric_split, data.metric_rows)
    trainer.stops.check()
    trainer.components.adapted.place(params)
    trainer.display.line(f"answering {len(rows)} {data.metric_split} rows {when} training")
    return answer_rows(components.base, rows, config, before_step=trainer.stops.check, log=trainer.display.line)


def _record(trainer: Trainer, config: Config, result: GenerationResult) -> None:
    step = trainer.state.progress.step
    for answer in result.answers:
        trainer.writer.log_sample(step=step, **vars(answer))
    trainer.writer.log_metrics(
        step=step,
        split=config.data.metric_split,
        metric=config.data.metric,
        score=result.score,
        rows=len(result.answers),
        generated_tokens=result.tokens,
    )


def _samples_of_step(path: Path, step: int) -> dict[int, dict[str, Any]]:
    """Return the rows of samples.jsonl that were written at `step`, by row index."""
    return {row["row"]: row for row in read_rows(path) if row["step"] == step and "row" in row}
