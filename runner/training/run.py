"""One run from its start to its end: load, put the state back, train, write the result, say what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from runner import loggers
from runner.backends.cpu.blas import BlasReport
from runner.checkpoints.retention import RetentionPolicy
from runner.checkpoints.store import CheckpointStore
from runner.common.clock import utc_now
from runner.common.errors import Diverged, RunnerError, StorageError
from runner.models.device import on_cpu
from runner.models.forward import checkpointed
from runner.reports.progress import Display
from runner.runs.inspect import objective_value
from runner.runs.rows import read_rows
from runner.runs.run_spec import RunSpec
from runner.training.build import build_trainer, require_same_inputs
from runner.training.components import load_components, release_frozen_blocks
from runner.training.finalize import finalize, finish_backup, generate_samples
from runner.training.resume import ResumePoint, find_resume_point, is_done
from runner.training.run_writer import RunWriter, copy_rows
from runner.training.shared import SharedComponents
from runner.training.signals import StopRequested, StopSignals
from runner.training.train_state import Progress
from runner.training.trainer import train


def run(start: RunSpec, blas: BlasReport, shared: SharedComponents | None = None) -> float | None:
    """Train what `start` describes, in its directory; returns the objective, where there is one.

    Jobs of a sweep in one process hand in what they share.

    Raises:
        RunnerError: with the documented exit code; the run's status says why it ended.
        SystemExit: 128 + the signal's number, after a stop by a signal.
    """
    directory = start.directory
    directory.lock()
    try:
        with StopSignals() as stops:
            found = find_resume_point(start)
            if is_done(start, found):
                again = shlex.quote(str(directory.path))
                print(f"{directory.path} is finished; nothing is left to do. A new run like it: repeat={again}")
                if backup := _make_record(start).backup:  # what its end may not have waited for
                    print(*finish_backup(backup, stops), sep="\n")
                return _objective(start, found.restored.progress) if found else None
            together = shared or SharedComponents()
            if found:
                with ended_by(stops):
                    require_same_inputs(start.config, found, together, stops)  # a resume that is refused writes nothing
            record = open_record(start, found)
            try:
                return _train(start, blas, found, record, stops, together, alone=shared is None)
            except RunnerError as error:
                error.args = (start.redacted(str(error)),)
                kind = "diverged" if isinstance(error, Diverged) else "failed"
                with suppress(StorageError):  # a full disk refuses the status as well: what failed first is told
                    record.status(state=kind, reason=str(error), ended=utc_now())
                raise
            except (Exception, SystemExit) as error:
                if not isinstance(error, SystemExit):
                    with suppress(StorageError):
                        record.status(
                            state="failed", reason=start.redacted(f"{type(error).__name__}: {error}"), ended=utc_now()
                        )
                raise
            finally:
                record.close()
                if shared is None:
                    together.close()
    finally:
        directory.unlock()


@contextmanager
def ended_by(stops: StopSignals, record: RunWriter | None = None) -> Iterator[None]:
    """Ends the process as after any stop where one was asked for before the first update; `record` keeps why."""
    try:
        yield
    except StopRequested:
        assert stops.signal is not None
        if record:
            record.status(state="stopped", reason=stops.signal.name, ended=utc_now())
        raise SystemExit(128 + stops.signal) from None


def open_record(start: RunSpec, found: ResumePoint | None) -> RunWriter:
    """The files of the run: config.yaml and status.json written, row files cut to what the checkpoint saw."""
    settings, directory = start.config, start.directory
    record = _make_record(start)
    directory.write_config(start.stored)
    restored = found.restored if found else None
    if found and start.source and start.source.branch:
        assert restored is not None
        copy_rows(start.source.run / "metrics.jsonl", directory.metrics, restored.metrics_offset)
        copy_rows(start.source.run / "samples.jsonl", directory.samples, restored.samples_offset)
    if found and start.source and not start.source.branch:
        record.source_step = found.loaded.checkpoint.step
    before = directory.read_status() if directory.status.exists() else {}
    record.status(
        run_id=start.run_id,
        state="running",
        step=restored.progress.step if restored else 0,
        iters=settings.train.iters,
        started=before.get("started", utc_now()),
        resumed=[*before.get("resumed", []), utc_now()] if start.source and not start.source.branch else None,
        parent=str(start.source.checkpoint) if start.source and start.source.branch else before.get("parent"),
        last_checkpoint=found.loaded.checkpoint.step if found and record.source_step is not None else None,
    )
    record.open(*((restored.metrics_offset, restored.samples_offset, restored.seconds) if restored else ()))
    if record.backup:
        record.backup.wake()  # catches up, and tells at once where it cannot
    return record


def _make_record(start: RunSpec) -> RunWriter:
    """What a run leaves behind; nothing is opened or written yet."""
    chosen = start.config.checkpoint
    return RunWriter(
        start.directory,
        CheckpointStore(start.directory.checkpoints, start.run_id),
        RetentionPolicy(chosen.keep_last, chosen.keep_best, chosen.keep_every),
        loggers.build(start.config.loggers),
        background=chosen.background,
        backup=Path(chosen.backup).expanduser() if chosen.backup else None,
    )


def _train(
    start: RunSpec,
    blas: BlasReport,
    found: ResumePoint | None,
    record: RunWriter,
    stops: StopSignals,
    shared: SharedComponents,
    *,
    alone: bool,
) -> float | None:
    settings = start.config
    mx.reset_peak_memory()
    limit = settings.train.cache_limit_gb
    former = mx.set_cache_limit(int(limit * 1e9)) if limit is not None else None
    if not on_cpu():
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        maybe_set_recommended_wired_limit()
    with Display(
        start.directory.log,
        settings.train.iters,
        lambda: mx.get_peak_memory() / 1e9,
        label=start.label,
        redact=start.redacted,
    ) as display:
        for line in [blas.advice] if blas.advice else []:
            display.line(line, "yellow")
        with ended_by(stops, record):
            parts = load_components(settings, start.stored, blas, shared, display, stops)
        try:
            if alone:
                release_frozen_blocks(settings, parts, display)
            job = build_trainer(start, found, parts, record, stops, display)
            with checkpointed(parts.adapted.model.layers, settings.train.grad_checkpoint):
                generate_samples(job, parts, settings, before=True)
                job.display.begin(job.members[0].progress.step, start.stop_at)
                try:
                    ending = train(job)
                finally:
                    job.batches.close()
            job.display.stop()
            finalize(job, parts, start, ending)
        finally:
            parts.adapted.remove()
            if former is not None:
                mx.set_cache_limit(former)
            mx.clear_cache()  # the next job in this process starts with as much memory as this one did
    if stops.signal is not None:
        raise SystemExit(128 + stops.signal)
    return _objective(start, job.members[0].progress)


def _objective(start: RunSpec, progress: Progress) -> float | None:
    rows = read_rows(start.directory.metrics)
    return objective_value(rows, progress.best_loss, start.config.objective.metric)
