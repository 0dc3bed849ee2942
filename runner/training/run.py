"""One run from start to end: prepare, load, train, finalize, close."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial

from runner.backends import blas
from runner.checkpoints.save_policy import StopReason
from runner.common.atomic_io import open_text
from runner.common.clock import utc_now
from runner.common.commands import repeat_command
from runner.common.errors import EXIT_REPLACE, Diverged, RunnerError, StorageError
from runner.config.objectives import metrics_of
from runner.models.device import on_cpu
from runner.reports.html.write import write_report_or_say_why
from runner.reports.progress import Display
from runner.runs.metric_values import metric_value
from runner.runs.rows import read_rows
from runner.runs.run_spec import RunSpec
from runner.training import epochs, template_date
from runner.training.answers import record_answers_before_training
from runner.training.build import build_backup, build_retention, build_trainer, open_writer
from runner.training.component_loader import ComponentLoader
from runner.training.components import free_frozen_weights, load_components
from runner.training.device_failures import device_errors_explained
from runner.training.finalize import finalize, finish_backup
from runner.training.memory import memory_limits, memory_usage
from runner.training.memory_estimate import PlannedModel
from runner.training.memory_fit import memory_warning
from runner.training.resume import find_resume_point, is_already_finished, require_same_inputs
from runner.training.run_writer import RunWriter
from runner.training.shared_start import describe_ranks, send_spec, with_own_share
from runner.training.signals import StopRequested, StopSignals
from runner.training.too_large import refuse_too_large
from runner.training.trainer import Trainer
from runner.training.world import ALONE, World


def train_run(spec: RunSpec, shared: ComponentLoader | None = None, world: World = ALONE) -> float | None:
    """Train the run that `spec` describes, in its directory, and return its objective if it has one.

    Jobs of a sweep in one process pass the loader that they share. This is rank 0 of `world`; for others see `follow`.

    Raises:
        RunnerError: with the documented exit code; status.json has the reason.
        SystemExit: 128 + the signal's number, after a stop signal; EXIT_REPLACE, where a supervised process has made
            its number of updates.
    """
    with ExitStack() as stack:
        stack.enter_context(device_errors_explained(spec))
        spec.directory.lock()
        stack.callback(spec.directory.unlock)
        stops = stack.enter_context(StopSignals())
        stack.enter_context(world.connected(stops))
        spec, point = find_resume_point(spec)
        spec = template_date.fill_date(spec)
        if point is not None and is_already_finished(spec, point):
            _accept(spec)
            _print_finished(spec, stops)
            return _objective(spec, point.saved.progress.best_loss)
        send_spec(world, spec)
        refuse_too_large(world, spec.config)
        loader = shared or stack.enter_context(closing(ComponentLoader()))
        if point is not None:
            with _exit_on_stop(stops):
                require_same_inputs(spec, point, loader, stops)  # a refused resume writes nothing
                spec = epochs.fill_iters(spec, loader, stops.check, point.saved.progress.step)
        _accept(spec)
        stack.callback(_write_report, spec)  # last of all: it shows what the others wrote
        writer = stack.enter_context(closing(open_writer(spec, point, world.size)))
        stack.enter_context(_failure_recorded(spec, writer))
        stack.enter_context(device_errors_explained(spec))  # before they are recorded
        buffer_cache = stack.enter_context(memory_limits(spec.config.train.cache_limit_gb))
        display = stack.enter_context(_open_display(spec))
        if not on_cpu() and buffer_cache.limit is not None:
            size = f"{buffer_cache.limit / 1e9:.2f} GB"
            display.line(f"memory up to {size} of freed buffers stay cached (train.cache_limit_gb)")
        if advice := blas.load_blas().advice:
            display.line(advice, "yellow")
        with _exit_on_stop(stops, writer):
            if point is None and spec.config.train.epochs is not None:
                spec = epochs.fill_iters(spec, loader, stops.check)
                spec.directory.write_config(spec.stored)
                writer.update_status(iters=spec.config.train.iters)
                display.set_iters(spec.config.train.iters)
            components = load_components(spec, loader, display, stops)
        stack.callback(components.adapted.remove)
        trained_on = components.data.stats["train"]
        writer.update_status(train_rows=trained_on.rows, train_tokens=trained_on.tokens)
        loaded = PlannedModel(components.adapted, components.backend)
        if warning := memory_warning(with_own_share(spec, world).config, components.data, loaded):
            display.line(warning, "yellow")
        if spec.config.train.epochs is not None:
            display.line(epochs.describe(spec.config, components.data.train.example_count))
        if components.data.dated:
            template_date.record_date(spec)
        if shared is None:
            free_frozen_weights(spec.config, components, display)
        for line in describe_ranks(world, spec.config):
            display.line(line)
        world.on_abort(partial(_record_abort, spec, writer))
        with _exit_on_stop(stops, writer):
            trainer = build_trainer(spec, point, components, writer, stops, display, buffer_cache, world)
        _train_and_finalize(trainer, spec)
        if stops.signal is not None:
            raise SystemExit(128 + stops.signal)
        return _objective(spec, trainer.state.progress.best_loss)


def _train_and_finalize(trainer: Trainer, spec: RunSpec) -> None:
    """Train until the run ends, then write its result and report how it ended."""
    with closing(trainer.batches):
        record_answers_before_training(trainer, spec.config)
        trainer.display.begin(trainer.state.progress.step, spec.stop_at)
        stop = trainer.train()
    trainer.display.stop()
    if stop is StopReason.REPLACE:
        trainer.writer.finish_rows()
        trainer.writer.update_status(step=trainer.state.progress.step)
        raise SystemExit(EXIT_REPLACE)
    finalize(trainer, spec, stop)


def _accept(spec: RunSpec) -> None:
    if spec.on_accepted is not None:
        spec.on_accepted()


def _print_finished(spec: RunSpec, stops: StopSignals) -> None:
    """Print that a finished run has nothing left to do, and complete its backup, which may be behind."""
    path = spec.directory.path
    print(f"{path} is finished; nothing is left to do. For a new run like it: {repeat_command(path)}")
    if backup := build_backup(spec, build_retention(spec)):
        print(*finish_backup(backup, path, stops), sep="\n")


def _objective(spec: RunSpec, best_loss: float | None) -> float | None:
    metric, *_ = metrics_of(spec.config.objective.metric)
    return metric_value(read_rows(spec.directory.metrics), best_loss, metric)


def _write_report(spec: RunSpec) -> None:
    """Write report.html, or log why there is none."""
    problem = write_report_or_say_why(spec.directory.path)
    if problem is None:
        return
    with suppress(StorageError, OSError), open_text(spec.directory.log) as log:
        log.write(f"{utc_now()} {problem}\n")
    if spec.label is None:
        print(problem, flush=True)


def _open_display(spec: RunSpec) -> Display:
    return Display(
        spec.directory.log,
        spec.config.train.iters,
        lambda: str(memory_usage()),
        label=spec.label,
        redact=spec.redacted,
    )


@contextmanager
def _exit_on_stop(stops: StopSignals, writer: RunWriter | None = None) -> Iterator[None]:
    """Exit as after any stop if a signal arrives before training; a writer records it in the status."""
    try:
        yield
    except StopRequested:
        assert stops.requested is not None
        if writer is not None:
            writer.update_status(state="stopped", reason=stops.requested.name, ended=utc_now())
        raise SystemExit(128 + stops.requested) from None


def _record_abort(spec: RunSpec, writer: RunWriter, error: BaseException) -> None:
    """Record why this process ends although its training thread waits inside of MLX."""
    with suppress(StorageError, OSError), open_text(spec.directory.log) as log:
        log.write(f"{utc_now()} {error}\n")
    writer.update_status(state="failed", reason=str(error), ended=utc_now())


@contextmanager
def _failure_recorded(spec: RunSpec, writer: RunWriter) -> Iterator[None]:
    """Record an error in status.json, with values from the environment redacted, and raise it again."""
    try:
        yield
    except Exception as error:
        state, reason = "failed", spec.redacted(f"{type(error).__name__}: {error}")
        if isinstance(error, RunnerError):
            state, reason = "diverged" if isinstance(error, Diverged) else "failed", spec.redacted(str(error))
            error.args = (reason,)
        with suppress(StorageError):  # a full disk refuses the status as well: the first error is reported
            writer.update_status(state=state, reason=reason, ended=utc_now())
        raise
