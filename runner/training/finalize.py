"""What follows the loop: the result, its test loss and answers, the final status, the backup and the summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from runner.checkpoints.mirror import BackupMirror
from runner.checkpoints.safetensors_file import pieces
from runner.checkpoints.save_policy import StopReason
from runner.common.clock import utc_now
from runner.common.commands import resume_command
from runner.config import serialize
from runner.models.arrays import parse_arrays, to_tensors
from runner.models.lora import Params
from runner.reports import next_commands, run_summary
from runner.reports.progress import measures_text
from runner.runs.inspect import RunInfo
from runner.runs.run_spec import RunSpec
from runner.training import state_files
from runner.training.answers import compare_answers, record_answers_after_training
from runner.training.dataloader import evaluation_loader
from runner.training.evaluate import EvaluationResult
from runner.training.signals import StopRequested, StopSignals
from runner.training.trainer import Trainer

_LOGGER_SECONDS, _LOGGER_SECONDS_AT_SIGNAL = 30.0, 5.0
"""How long loggers that are behind are waited for, at most, and after a stop signal; a resume logs what is missing."""
_NOTICE_SECONDS = 2.0
"""How long a backup may take without a line that says so."""


def finalize(trainer: Trainer, spec: RunSpec, stop: StopReason) -> None:
    """Write the result; evaluate it if the run is complete; record and print how the run ended.

    A stop signal abandons the final evaluation: the run counts as stopped, and its resume evaluates the result.
    """
    writer = trainer.writer
    if not stop.is_completion:
        trainer.stops.stop_sharing()
    result_step = writer.retention.result_step(spec.config.checkpoint.result)
    if result_step is not None:
        writer.write_result(result_step)
    lines: list[str] = []
    if stop.is_completion:
        with suppress(StopRequested):
            lines = _evaluate_result(trainer, spec, result_step)
    trainer.stops.stop_sharing()
    if trainer.stops.signal is not None:
        stop = StopReason(trainer.stops.signal.name)
    _write_final_status(trainer, stop, result_step)
    seconds = _LOGGER_SECONDS if trainer.stops.signal is None else _LOGGER_SECONDS_AT_SIGNAL
    for line in writer.finish_loggers(_state(stop), seconds, trainer.display.line):
        trainer.display.line(line, "yellow")
    if writer.backup:
        for line in finish_backup(writer.backup, spec.directory.path, trainer.stops, trainer.display.line):
            trainer.display.line(line, "yellow")
    for line in lines:
        trainer.display.line(line)
    _print_summary(trainer, spec, stop, result_step)


def finalize_share(trainer: Trainer, spec: RunSpec, stop: StopReason) -> None:
    """Take part in what the ranks do together at the end: the evaluation of a complete run's result."""
    if not stop.is_completion or not spec.config.train.test:
        return
    received = parse_arrays(trainer.world.broadcast(None), source="the result of rank 0")
    with suppress(StopRequested):
        _test_split(trainer, spec, trainer.components.adapted.from_stored(received))


def finish_backup(
    backup: BackupMirror, run: Path, stops: StopSignals, print_line: Callable[[str], None] = print
) -> list[str]:
    """Wait until the backup of `run` is complete or another signal arrives; return what to report about it."""
    signal_before, start, notice_due = stops.signal, time.monotonic(), True

    def keep_waiting() -> bool:
        nonlocal notice_due
        if notice_due and time.monotonic() - start > _NOTICE_SECONDS:
            notice_due = False
            print_line(f"waiting for the backup in {backup.root}; after Ctrl-C, to complete it: {resume_command(run)}")
        return stops.signal is signal_before

    is_complete = backup.finish(keep_waiting)
    messages = backup.new_messages()
    if is_complete:
        return [*messages, f"mirrored to {backup.folder}"]
    problem = backup.problem or "interrupted"
    return [*messages, f"the backup is incomplete ({problem.rstrip('.')}); to complete it: {resume_command(run)}"]


def _evaluate_result(trainer: Trainer, spec: RunSpec, result_step: int | None) -> list[str]:
    """Evaluate the result on the test split and let it answer held-out rows, as configured; return lines to print.

    Raises:
        StopRequested: a stop signal arrived.
    """
    config, params = spec.config, trainer.state.adapter
    if result_step is not None and (config.train.test or config.data.metric_rows):
        stored = state_files.read_params(trainer.writer.store.load_step(result_step))
        params = trainer.components.adapted.from_stored(stored)
    if config.train.test and trainer.world.size > 1:
        tensors = trainer.components.adapted.to_stored(to_tensors(params))
        trainer.world.broadcast(b"".join(pieces(tensors)))
    lines = _evaluate_test_split(trainer, spec, params, result_step) if config.train.test else []
    if config.data.metric_rows and config.data.metric:
        record_answers_after_training(trainer, params, config)
        lines += compare_answers(trainer, config.data.metric)
    return lines


def _evaluate_test_split(trainer: Trainer, spec: RunSpec, params: Params, result_step: int | None) -> list[str]:
    result, fingerprint = _test_split(trainer, spec, params)
    perplexity = math.exp(min(result.loss, 700)) if spec.config.method.name == "sft" else None
    trainer.writer.log_metrics(
        step=trainer.state.progress.step,
        split="test",
        loss=result.loss,
        **({"perplexity": perplexity} if perplexity is not None else result.measures),
        of_step=result_step,
    )
    identity = trainer.method.identity(fingerprint)
    trainer.writer.log_row_losses(trainer.state.progress.step, "test", identity, result.rows)
    beside = f"perplexity {perplexity:.3f}" if perplexity is not None else measures_text(result.measures)
    return [f"test loss {result.loss:.4f}, {beside}"]


def _test_split(trainer: Trainer, spec: RunSpec, params: Params) -> tuple[EvaluationResult, str]:
    """Evaluate `params` on the test split, on all ranks together; return the result and the fingerprint of its rows."""
    components = trainer.components
    batches = evaluation_loader(components.data.test, spec.config, components.caches, trainer.world)
    return trainer.method.evaluate(params, "test", batches, trainer.stops.check), batches.fingerprint


def _write_final_status(trainer: Trainer, stop: StopReason, result_step: int | None) -> None:
    writer = trainer.writer
    writer.finish_rows()
    writer.update_status(
        state=_state(stop),
        step=trainer.state.progress.step,
        reason=None if stop is StopReason.FINISHED else stop.value,
        result_step=result_step,
        best=trainer.state.progress.best,
        seconds=round(writer.seconds(), 1),
        ended=utc_now(),
    )


def _print_summary(trainer: Trainer, spec: RunSpec, stop: StopReason, result_step: int | None) -> None:
    display, progress, state = trainer.display, trainer.state.progress, _state(stop)
    # What finished has the loss of its result; what stopped, as at a rung of a search, is compared by that of its step.
    is_measured_here = state == "stopped" and progress.valid_step == progress.step
    loss = progress.valid_loss if is_measured_here else progress.best_loss
    text = "" if loss is None else f"valid loss {loss:.4f}"
    display.job_line(f"{state:<9} {progress.step:>6}/{trainer.plan.iters}  {text}")
    display.line("")
    run = RunInfo(path=spec.directory.path, state=state, settings=serialize.flatten_dict(spec.stored))
    for line in run_summary.summary_lines(
        spec.directory.path,
        state=state,
        reason=stop.value,
        step=progress.step,
        iters=trainer.plan.iters,
        seconds=trainer.writer.seconds(),
        tokens=progress.tokens,
        baseline=progress.baseline_loss,
        best=progress.best,
        result_step=result_step,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
        commands=next_commands.after_run(run, has_result=result_step is not None),
    ):
        display.line(line)


def _state(stop: StopReason) -> str:
    return "finished" if stop.is_completion else "stopped"
