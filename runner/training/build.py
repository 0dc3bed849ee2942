"""Building a run from its spec: the writer of its files and the trainer, fresh or restored from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from runner import loggers
from runner.checkpoints.mirror import BackupMirror
from runner.checkpoints.retention import RetentionPolicy
from runner.checkpoints.run_retention import RunRetention
from runner.checkpoints.save_policy import SavePolicy
from runner.checkpoints.store import CheckpointStore
from runner.common.atomic_io import write_atomically
from runner.common.clock import utc_now
from runner.common.errors import CheckpointError
from runner.common.filesystem import FileSystem
from runner.config.labels import NO_LABELS
from runner.config.schema import Config
from runner.data.order import BatchOrder
from runner.loggers.background import build_background
from runner.loggers.logged_run import logged_run
from runner.models.lora import Params
from runner.reports.progress import Display
from runner.runs.directory import RunDirectory
from runner.runs.labels import write_labels
from runner.runs.lineage import record_parents
from runner.runs.run_spec import RunSpec
from runner.training import state_files
from runner.training.components import Components
from runner.training.dataloader import PrefetchingLoader, batch_builder, evaluation_loader
from runner.training.legacy_window import window_of_run
from runner.training.lr_schedule import learning_rate_of
from runner.training.memory import BufferCache
from runner.training.methods.build import build_method, has_reference
from runner.training.methods.method import Method
from runner.training.methods.reference import BASE, params_fingerprint
from runner.training.plan import TrainingPlan
from runner.training.process_limit import ProcessLimit
from runner.training.resume import ResumePoint, numeric_differences
from runner.training.run_writer import RunWriter
from runner.training.shared_start import compare_inputs, share_baseline, share_state
from runner.training.signals import StopSignals
from runner.training.start_adapter import settings_that_differ, warm_started_params
from runner.training.train_state import TrainState
from runner.training.train_step import TrainStep
from runner.training.trainer import Trainer
from runner.training.world import ALONE, World


def build_retention(spec: RunSpec, point: ResumePoint | None = None) -> RunRetention:
    """Build the retention of the run's checkpoints; the one that it resumed from in its own directory is retained."""
    checkpoint = spec.config.checkpoint
    return RunRetention(
        CheckpointStore(spec.directory.checkpoints, spec.run_id),
        RetentionPolicy(checkpoint.keep_last, checkpoint.keep_best, checkpoint.keep_every),
        source_step=point.checkpoint.step if point and point.branched_from is None else None,
    )


def build_backup(spec: RunSpec, retention: RunRetention) -> BackupMirror | None:
    """Build the mirror of the run in its configured backup folder; None without one. It does nothing until woken."""
    root = spec.config.checkpoint.backup
    if not root:
        return None
    return BackupMirror(Path(root).expanduser(), spec.directory, retention.store, retention.mirrored_steps)


def open_writer(spec: RunSpec, point: ResumePoint | None, ranks: int = 1) -> RunWriter:
    """Write config.yaml and status.json, and open the other files, cut to their length at the checkpoint."""
    directory, retention = spec.directory, build_retention(spec, point)
    writer = RunWriter(
        directory,
        retention,
        build_background(loggers.build(spec.config.loggers)),
        background=spec.config.checkpoint.background,
        backup=build_backup(spec, retention),
    )
    if (spec.source is None or spec.source.branch) and spec.labels != NO_LABELS:
        write_labels(directory.path, spec.labels)
    # The status first: without a config.yaml there is nothing to resume, and with one it must be known where a branch
    # begins.
    first_status = {**_first_status(spec, point, ranks), "last_checkpoint": retention.source_step}
    writer.update_status(durable=True, **first_status)
    directory.write_config(spec.stored)
    if point is not None and point.branched_from is not None:
        source, written = RunDirectory(point.branched_from), point.saved.written
        _copy_rows(source.metrics, directory.metrics, written.metrics_offset)
        _copy_rows(source.samples, directory.samples, written.samples_offset)
        _copy_rows(source.row_losses, directory.row_losses, written.row_losses_offset, optional=True)
    writer.open(logged_run(spec), point.saved.written if point else None)
    if writer.backup:
        writer.backup.wake()  # catches up, and reports at once if it cannot
    return writer


def _first_status(spec: RunSpec, point: ResumePoint | None, ranks: int) -> dict[str, Any]:
    """Return the status of a run that begins or resumes; it keeps when the run started, resumed and died before."""
    previous, source = spec.directory.read_status(), spec.source
    return {
        "run_id": spec.run_id,
        "state": "running",
        "ranks": ranks if ranks > 1 else None,
        "step": point.saved.progress.step if point else 0,
        "iters": spec.config.train.iters,
        "started": previous.get("started", utc_now()),
        "resumed": [*previous.get("resumed", []), utc_now()] if source and not source.branch else None,
        "restarts": previous.get("restarts"),
        "skipped_updates": (point.saved.progress.skipped_updates or None) if point else None,
        "parent": str(source.checkpoint) if source and source.branch else previous.get("parent"),
        "parents": _parents(spec) if source is None or source.branch else previous.get("parents"),
    }


def _parents(spec: RunSpec) -> list[dict[str, Any]] | None:
    """Return what the status of a new run or a branch records of the runs that it comes from."""
    branch = spec.source.checkpoint if spec.source else None
    adapter = None if branch else spec.config.adapter
    recorded = record_parents(branch=branch, repeat=spec.repeats, adapter=adapter)
    return [{**parent, "path": spec.redacted(parent["path"])} for parent in recorded] or None


def _copy_rows(source: Path, target: Path, size: int, *, optional: bool = False) -> None:
    """Start a branch's row file with the first `size` bytes of the run that it branches from.

    Raises:
        CheckpointError: the source has fewer bytes than when the checkpoint was saved, and the file is not `optional`.
    """
    data = FileSystem().read_file(source, 1 << 40)[:size] if source.exists() else b""
    if len(data) < size and not optional:
        raise CheckpointError(f"{source} has {len(data)} bytes, but the checkpoint counts on {size}: it was cut.")
    write_atomically(target, data)


def build_trainer(
    spec: RunSpec,
    point: ResumePoint | None,
    components: Components,
    writer: RunWriter,
    stops: StopSignals,
    display: Display,
    buffer_cache: BufferCache,
    world: World = ALONE,
) -> Trainer:
    """Build the trainer in its initial state, or restore it from the checkpoint of `point`; other ranks than the first
    take the state of that.

    Raises:
        CheckpointError: the checkpoint does not fit this run.
        ModelError: the weights of a warm start do not fit.
        ConfigError: a rank has loaded another model or other data.
    """
    config, data = spec.config, components.data
    params = components.adapted.params()
    state = TrainState.begin(config, params)
    for line in compare_inputs(world, components):
        display.line(line, "yellow")
    share_baseline(world, components)
    if not world.is_first:
        pass  # its state is sent below
    elif point is not None:
        _restore(state, point, components, display)
    elif config.adapter:
        state.params = warm_started_params(config, state.params, components.adapted)
        display.line(f"warm start from {config.adapter}")
        if differing := settings_that_differ(config.adapter, spec.stored):
            display.line(f"the adapter was trained with {differing}")
    else:
        state.params = components.adapted.start_pissa(state.params)
    window = window_of_run(config, point.saved.window if point else None, components.backend)
    window = share_state(world, state, window, components)
    components, method = _method(config, point, components, params, state.params, stops, display, world)
    if point is None and spec.source is not None:
        display.line("no checkpoint yet: training starts from the beginning")
    train = config.train
    order = BatchOrder(data.train.example_lengths, train.batch_size, config.seed, window, data.mixture)
    if point is not None and state.position.batch >= order.batches_per_epoch:
        raise CheckpointError(
            f"{point.checkpoint.path} is damaged: its position is batch {state.position.batch} of an epoch of "
            f"{order.batches_per_epoch}."
        )
    builder = batch_builder(data.train, config, components.caches)
    return Trainer(
        plan=_plan(spec, has_validation=len(data.valid) > 0),
        save_policy=SavePolicy(config.checkpoint.every, config.checkpoint.every_minutes),
        learning_rate=lambda update: learning_rate_of(config, update),
        components=components,
        state=state,
        order=order,
        batches=PrefetchingLoader(builder, order, train.grad_accumulation, train.prefetch, train.rows_at_once, world),
        valid_batches=evaluation_loader(data.valid, config, components.caches, world),
        method=method,
        train_step=TrainStep(components.backend, grad_clip=train.grad_clip, method=method, world=world),
        writer=writer,
        stops=stops,
        display=display,
        process_limit=ProcessLimit(spec.supervise, watches_memory=world.size == 1),
        skip_limit=train.nonfinite_limit if train.on_nonfinite == "skip" else None,
        buffer_cache=buffer_cache,
        world=world,
    )


def _method(
    config: Config,
    point: ResumePoint | None,
    components: Components,
    fresh: Params,
    started: Params,
    stops: StopSignals,
    display: Display,
    world: World,
) -> tuple[Components, Method]:
    """Return the method, and the components with an identity that names its reference.

    `fresh`: the adapter without a warm start. `started`: the one that a new run starts from.
    """
    fingerprint = BASE
    if point and "reference" in point.saved.identity.fingerprints and not config.adapter:
        raise CheckpointError(
            f"{point.checkpoint.path} was trained with an adapter as the reference of method={config.method.name}: "
            "name the one that the run began with, adapter=FOLDER."
        )
    if has_reference(config.method) and config.adapter:
        fingerprint = point.saved.identity.fingerprints["reference"] if point else params_fingerprint(started)
        if world.size > 1:
            fingerprint = world.broadcast(fingerprint.encode()).decode()
        named = {**components.identity.fingerprints, "reference": fingerprint}
        components = replace(components, identity=replace(components.identity, fingerprints=named))

    def reference_params() -> Params:
        if not config.adapter:
            return components.adapted.without_effect(fresh)
        params = warm_started_params(config, fresh, components.adapted)
        if params_fingerprint(params) != fingerprint:
            raise CheckpointError(
                f"adapter={config.adapter} has other weights than when the run began: they are the reference of "
                f"method={config.method.name}."
            )
        return params

    method = build_method(
        config,
        components.adapted,
        components.backend,
        components.data,
        components.caches,
        reference_fingerprint=fingerprint,
        reference_params=reference_params,
        check_stop=stops.check,
        log=display.line,
        world=world,
    )
    return components, method


def _restore(state: TrainState, point: ResumePoint, components: Components, display: Display) -> None:
    path = point.checkpoint.path
    messages = [*point.messages]
    if differences := numeric_differences(point.saved.identity, components.identity):
        messages.append(f"results may differ in the last digits from an uninterrupted run: {'; '.join(differences)}")
    for line in messages:
        display.line(line, "yellow")
    state_files.restore(state, point.saved, components.adapted, str(path))
    display.line(f"resumed from {path} at step {state.progress.step}")


def _plan(spec: RunSpec, *, has_validation: bool) -> TrainingPlan:
    train = spec.config.train
    return TrainingPlan(
        iters=train.iters,
        report_every=train.report_every,
        eval_every=train.eval_every,
        eval_at=frozenset(train.eval_at),
        evaluates=has_validation,
        stop_at=spec.stop_at,
        patience=train.early_stopping.patience,
        min_delta=train.early_stopping.min_delta,
    )
