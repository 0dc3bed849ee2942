"""From settings to a job for the loop: model, data, adapter, member, and a checkpoint's state put back."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from runner import __version__
from runner.backends.cpu import cross_entropy
from runner.backends.cpu.blas import BlasReport, blas_identity
from runner.checkpoints.save_policy import SavePolicy
from runner.common.errors import CheckpointError, ConfigError, ModelError
from runner.config import resume_policy, schema
from runner.config.schema import Config
from runner.data.formats import EncodeOptions
from runner.data.order import BatchOrder, DataPosition
from runner.data.tokenize import TokenizedDataset
from runner.models.device import on_cpu
from runner.models.forward import Forward
from runner.models.hidden_cache import HiddenStateCaches
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel, read_weights, trainable_share, warm_start
from runner.reports.progress import Display
from runner.runs.run_spec import RunSpec
from runner.training import optimizer, plan, state_files
from runner.training.baseline import Baseline
from runner.training.dataloader import PrefetchingLoader
from runner.training.feeding import batch_builder, fixed_batches, make_forward, window_of
from runner.training.lr_schedule import learning_rate
from runner.training.resume import ResumePoint
from runner.training.run_writer import RunWriter
from runner.training.shared import SharedComponents
from runner.training.signals import StopSignals
from runner.training.state_files import RunIdentity
from runner.training.train_state import TrainState
from runner.training.train_step import TrainStep
from runner.training.trainer import Trainer


@dataclass
class Components:
    """What is loaded for a run."""

    base: BaseModel
    data: TokenizedDataset
    reading: EncodeOptions
    adapted: AdaptedModel
    forward: Forward
    trunks: HiddenStateCaches | None
    identity: RunIdentity
    baseline: Baseline


def load_components(
    settings: Config,
    stored: dict[str, Any],
    blas: BlasReport,
    shared: SharedComponents,
    display: Display,
    stops: StopSignals,
) -> Components:
    """Load, or take from what is shared, the model and the data, and put the adapter on.

    Raises:
        ModelError, DataError: with what is wrong and where. Interrupted: a stop was asked for meanwhile.
    """
    base = shared.base(settings.model)
    for note in base.notes:
        display.line(note)
    data, reading = shared.data(settings.data, base, stops.check)
    for note in data.notes:
        display.line(note, "yellow")
    _require_splits(settings, data)
    if settings.data.metric_rows:
        _ = base.tokenizer  # now: what cannot be loaded, or has moved meanwhile, shall not fail after training
    # Named as written: a path that came from the environment is not written out.
    adapted = AdaptedModel(base, settings.lora, settings.seed, source=stored["model"]["path"])
    try:
        _introduce(settings, data, adapted, blas, display)
        forward = make_forward(base, adapted.num_layers, settings, blas)
        if forward.why_mlx:
            display.line(f"engine not used: {forward.why_mlx}; MLX computes")
        elif forward.why_numpy:
            display.line(f"engine without its code in C: {forward.why_numpy}; NumPy computes")
        trunks = shared.trunks(forward, base, settings, blas, display.line)
        _tell_trunk(settings, data, adapted, forward, trunks, display)
    except BaseException:
        adapted.remove()
        raise
    identity = _identity(settings, stored, base, data, blas, forward)
    baseline = shared.baseline(settings, base, data, identity.environment)
    return Components(base, data, reading, adapted, forward, trunks, identity, baseline)


def _tell_trunk(
    settings: Config,
    data: TokenizedDataset,
    adapted: AdaptedModel,
    forward: Forward,
    trunks: HiddenStateCaches | None,
    display: Display,
) -> None:
    frozen = len(adapted.model.layers) - adapted.num_layers
    if trunks:
        kept = trunks.place(data.train)
        where = f", up to {kept[1] / 1e9:.1f} GB kept in {kept[0]}" if kept else ""
        display.line(f"trunk  the first {forward.cut} blocks are computed once a row{where}")
    elif frozen and settings.train.hidden_cache.enabled:
        display.line(f"trunk  the first {frozen} blocks of this model cannot be computed apart: they run in each step")


def release_trunk(settings: Config, parts: Components, display: Display) -> None:
    """Let go of the weights below the cut where the run will not compute with them: every row is on disk, and nothing
    is generated. Not for a base that other jobs share."""
    trunks, data = parts.trunks, parts.data
    if trunks is None or not settings.train.hidden_cache.free_frozen_weights or settings.data.metric_rows:
        return
    used = [data.train, data.valid, *([data.test] if settings.train.test else [])]
    if not all(trunks.of(rows).complete() for rows in used if len(rows)):
        return

    def reload() -> nn.Module:
        display.line("trunk  a row is not in the cache: the base model is loaded again", "yellow")
        fresh = load_base_model(settings.model)
        if fresh.content_hash != parts.base.content_hash:
            raise ModelError(f"model.path={settings.model.path} has changed since the run began.")
        return fresh.model

    size = parts.forward.release_below(reload)
    mx.clear_cache()
    display.line(f"trunk  every row is on disk: the weights of these blocks are let go of, {size / 1e9:.2f} GB")


def _require_splits(settings: Config, data: TokenizedDataset) -> None:
    """Refuse before training what could only fail after it."""
    if settings.train.test and not len(data.test):
        raise ConfigError("train.test=true: the data have no test.jsonl.")
    split = settings.data.metric_split
    if settings.data.metric_rows and not len(data.test if split == "test" else data.valid):
        raise ConfigError(f"data.metric_rows={settings.data.metric_rows}: the data have no {split} rows to answer.")


def _introduce(
    settings: Config, data: TokenizedDataset, adapted: AdaptedModel, blas: BlasReport, display: Display
) -> None:
    ours, all_ = trainable_share(adapted)
    blocks = f"the last {adapted.num_layers} of {len(adapted.model.layers)} blocks"
    display.line(f"model  {adapted.source}: {all_ / 1e6:.1f}M parameters, {ours / 1e6:.3f}M trained in {blocks}")
    product = f", {blas.kind} BLAS, {blas.threads} threads" if blas.threads and on_cpu() else ""
    display.line(f"device {'CPU' if on_cpu() else 'GPU'}{product}")
    for split, counts in data.counts.items():
        left_out = [
            f"{number} {what}"
            for number, what in (
                (counts.truncated, f"cut at {settings.data.max_length}"),
                (counts.dropped, "dropped as too long"),
                (counts.nothing_to_learn, "without a token to learn"),
            )
            if number
        ]
        display.line(
            f"data   {split}: {counts.rows:,} rows, {counts.tokens:,} tokens, {counts.supervised:,} supervised, "
            f"longest {counts.longest}" + (f"; {', '.join(left_out)}" if left_out else "")
        )
    if not len(data.valid):
        display.line("data   no valid.jsonl: no validation, the last checkpoint is the result", "yellow")


def _identity(
    settings: Config,
    stored: dict[str, Any],
    base: BaseModel,
    data: TokenizedDataset,
    blas: BlasReport,
    forward: Forward,
) -> RunIdentity:
    return RunIdentity(
        run_id="",
        fingerprints={
            "model": base.fingerprint,
            "data_train": data.train.fingerprint,
            "data_valid": data.valid.fingerprint,
            "config": resume_policy.frozen_fingerprint(settings),
        },
        environment=numeric_environment(settings, blas, forward),
        hyperparameters=schema.flatten_dict(stored),
    )


def numeric_environment(settings: Config, blas: BlasReport, forward: Forward) -> dict[str, Any]:
    """What the last digits of a run depend on beside its settings; a checkpoint records it."""
    return {
        "runner": __version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(mx.default_device()),
        "blas": blas_identity(blas),
        "compiled": is_compiled(settings),
        "loss_piece": settings.train.loss_chunk,
        "trunk": forward.cut,
        "head": settings.train.head,
        "cpu_ops": cross_entropy.usable() and f"numpy {version('numpy')}",
        "engine": forward.engine and forward.engine.identity,
    }


def is_compiled(settings: Config) -> bool:
    """Whether the step is compiled: as set, or where it pays."""
    wanted = settings.train.compile
    return wanted == "always" or (wanted == "auto" and not on_cpu())


def build_trainer(
    start: RunSpec,
    found: ResumePoint | None,
    parts: Components,
    record: RunWriter,
    stops: StopSignals,
    display: Display,
) -> Trainer:
    """The loop's job: fresh, or with the state of the checkpoint that was found."""
    settings, data = start.config, parts.data
    member = _member(settings, parts, record)
    position = DataPosition()
    for line in found.said if found else []:
        display.line(line, "yellow")
    if found is not None:
        tell_differences(found, parts.identity, display)
        state_files.restore(member, found.restored, str(found.loaded.checkpoint.path))
        position = found.restored.position
        display.line(f"resumed from {found.loaded.checkpoint.path} at step {member.progress.step}")
    elif start.source is not None:
        display.line("resumed before the first checkpoint: from the beginning")
    if settings.adapter and found is None:
        member.params = warm_start(
            member.params, read_weights(Path(settings.adapter), fitting=member.params), settings.adapter
        )
        display.line(f"warm start from {settings.adapter}")
    forward, trunks = parts.forward, parts.trunks
    t = settings.train
    window = found.restored.window if found is not None else None
    order = BatchOrder(data.train.lengths, t.batch_size, settings.seed, window or window_of(forward, settings))
    if found is not None and position.batch >= order.batches_per_epoch:
        raise CheckpointError(
            f"{found.loaded.checkpoint.path} stands at batch {position.batch}, and an epoch has "
            f"{order.batches_per_epoch}: its position is damaged."
        )
    return Trainer(
        plan=plan.TrainingPlan(
            iters=t.iters,
            report_every=t.report_every,
            eval_every=t.eval_every,
            evaluates=len(data.valid) > 0,
            stop_at=start.stop_at,
            patience=t.early_stopping.patience,
            min_delta=t.early_stopping.min_delta,
        ),
        saves=SavePolicy(settings.checkpoint.every, settings.checkpoint.every_minutes),
        members=[member],
        position=position,
        order=order,
        batches=PrefetchingLoader(batch_builder(data.train, settings, trunks), order, t.grad_accumulation, t.prefetch),
        valid_batches=fixed_batches(data.valid, settings, trunks),
        adapted=parts.adapted,
        forward=forward,
        step=TrainStep(parts.adapted, forward, grad_clip=t.grad_clip, compiled=is_compiled(settings)),
        identity=parts.identity,
        baseline=parts.baseline,
        stops=stops,
        display=display,
    )


def _member(settings: Config, parts: Components, record: RunWriter) -> TrainState:
    params = parts.adapted.params()
    o, s = settings.optimizer, settings.schedule
    iters = s.iters or settings.train.iters

    def rate(update: int) -> float:
        return learning_rate(update, name=s.name, peak=o.learning_rate, iters=iters, warmup=s.warmup, end=s.end or 0.0)

    return TrainState(params, optimizer.build_optimizer(o, params), rate, settings.seed, record)


def require_same_inputs(settings: Config, found: ResumePoint, shared: SharedComponents, stops: StopSignals) -> None:
    """Load the model and the data, or take them from what is shared, and refuse others than the checkpoint's.

    Raises:
        ConfigError: with the fingerprints. ModelError, DataError: they cannot be loaded.
        Interrupted: a stop was asked for meanwhile.
    """
    base = shared.base(settings.model)
    data, _ = shared.data(settings.data, base, stops.check)
    then = found.restored.identity.fingerprints
    now = {"model": base.fingerprint, "data_train": data.train.fingerprint, "data_valid": data.valid.fingerprint}
    words = {
        "model": "the base model has other weights",
        "data_train": "the training data are others",
        "data_valid": "the validation data are others",
    }
    problems = [
        f"{text}: fingerprint {then.get(name, 'none')[:16]} then, {now[name][:16]} now."
        for name, text in words.items()
        if then.get(name) != now[name]
    ]
    if problems:
        problems.append("To train on them from here: adapter=RUN/adapters starts a new run from these weights.")
        raise ConfigError(f"{found.loaded.checkpoint.path} cannot go on here:\n" + "\n".join(problems))


def tell_differences(found: ResumePoint, now_: RunIdentity, display: Display) -> None:
    """Name what may change bits."""
    then = found.restored.identity
    for name, value in now_.environment.items():
        if then.environment.get(name) != value:
            display.line(
                f"bits may differ from an uninterrupted run: {name} was {then.environment.get(name)}, is {value}",
                "yellow",
            )
