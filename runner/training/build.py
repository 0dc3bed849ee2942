"""From settings to a job for the loop: model, data, adapter, member, and a checkpoint's state put back."""

from __future__ import annotations

from pathlib import Path

from runner.checkpoints.save_policy import SavePolicy
from runner.common.errors import CheckpointError, ConfigError
from runner.config.schema import Config
from runner.data.order import BatchOrder, DataPosition
from runner.models.lora import read_weights, warm_start
from runner.reports.progress import Display
from runner.runs.run_spec import RunSpec
from runner.training import optimizer, plan, state_files
from runner.training.components import Components, is_compiled
from runner.training.dataloader import PrefetchingLoader
from runner.training.feeding import batch_builder, fixed_batches, window_of
from runner.training.lr_schedule import learning_rate
from runner.training.resume import ResumePoint
from runner.training.run_writer import RunWriter
from runner.training.shared import SharedComponents
from runner.training.signals import StopSignals
from runner.training.state_files import RunIdentity
from runner.training.train_state import TrainState
from runner.training.train_step import TrainStep
from runner.training.trainer import Trainer


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
    forward, trunks = parts.forward, parts.caches
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
