"""One run from its start to its end: load, put the state back, train, write the result, say what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from runner import __version__, config, loggers
from runner.blas import BlasReport, blas_identity
from runner.checkpoints import verify
from runner.checkpoints.disk import Disk
from runner.checkpoints.retention import Policy
from runner.checkpoints.schedule import Schedule
from runner.checkpoints.store import Store
from runner.checkpoints.verify import Loaded
from runner.config import Config
from runner.data.batches import Batch, make_batch
from runner.data.formats import Keys, Reading
from runner.data.metrics import metric_named
from runner.data.order import Order, Position, evaluation_batches
from runner.data.tokens import DataSet, TokenSet, load_splits
from runner.errors import CheckpointError, ConfigError, Diverged, RunnerError
from runner.models.adapters import Adapted, read_weights, trainable_share, warm_start
from runner.models.forward import Forward, checkpointed
from runner.models.loading import Base, load, on_cpu
from runner.reports import summary
from runner.reports.progress import Display
from runner.rundir import RunDirectory, now
from runner.start import Start
from runner.training import events, optimizers, state
from runner.training.evaluation import evaluate
from runner.training.generation import generate
from runner.training.loop import FINISHED, STOPPED_EARLY, Job, best_of, train
from runner.training.member import Member
from runner.training.record import Record, copy_rows, repair_result, rows_of_step
from runner.training.schedules import learning_rate
from runner.training.state import Identity, Restored
from runner.training.step import Step
from runner.training.stops import Interrupted, Stops


@dataclass
class Parts:
    """What is loaded for a run."""

    base: Base
    data: DataSet
    reading: Reading
    adapted: Adapted
    identity: Identity


def run(start: Start, blas: BlasReport) -> float | None:
    """Train what `start` describes, in its directory; returns the best validation loss, where there is one.

    Raises:
        RunnerError: with the documented exit code; the run's status says why it ended.
        SystemExit: 128 + the signal's number, after a stop by a signal.
    """
    directory = start.directory
    directory.lock()
    try:
        with Stops() as stops:
            found = _find_checkpoint(start)
            if _is_done(start, found):
                print(
                    f"{directory.path} is finished already; nothing is left to do. A new run like it: repeat={directory.path}"
                )
                return found.restored.progress.best_loss if found else None
            record = _open_record(start, found)
            try:
                return _train(start, blas, found, record, stops)
            except RunnerError as error:
                kind = "diverged" if isinstance(error, Diverged) else "failed"
                record.status(state=kind, reason=str(error), ended=now())
                raise
            except (Exception, SystemExit) as error:
                if not isinstance(error, SystemExit):
                    record.status(state="failed", reason=f"{type(error).__name__}: {error}", ended=now())
                raise
            finally:
                record.close()
    finally:
        directory.unlock()


@dataclass
class Found:
    """The checkpoint that a run goes on from."""

    loaded: Loaded
    restored: Restored
    said: list[str]
    changed: bool
    """Whether settings differ from the stored ones."""


def _is_done(start: Start, found: Found | None) -> bool:
    """Whether a finished run was resumed as it is: there is nothing to load a model for."""
    if found is None or found.changed or start.source is None or start.source.branch:
        return False
    return bool(start.directory.read_status().get("ended") and start.directory.read_status()["state"] == "finished")


def _find_checkpoint(start: Start) -> Found | None:
    """The verified checkpoint to go on from, None for a fresh start; changed settings are judged here.

    Raises:
        CheckpointError: there were checkpoints and none is valid, or the one that was named is damaged.
        ConfigError: a frozen setting was changed.
    """
    if start.source is None:
        return None
    if start.source.checkpoint is not None:
        loaded, said = verify.load(start.source.checkpoint, Disk()), []
        restored = state.read(loaded)
    else:
        start.run_id, loaded_, said = _newest(start)
        if loaded_ is None:
            _judge_changes(start, 0)
            return None
        loaded, restored = loaded_, state.read(loaded_)
    changes = _judge_changes(start, restored.progress.step)
    return Found(loaded, restored, [*said, *changes], changed=bool(changes))


def _newest(start: Start) -> tuple[str, Loaded | None, list[str]]:
    directory = start.directory
    status = directory.read_status()
    run_id = status.get("run_id")
    if not isinstance(run_id, str):  # status.json is lost: the checkpoints know whose they are
        kept = Store(directory.checkpoints, "").checkpoints()
        run_id = kept[-1].run_id if kept else start.run_id
    store = Store(directory.checkpoints, run_id)
    repair_result(directory)
    said = store.repair()
    loaded, wrong = store.newest_valid(check=state.read)  # type: ignore[arg-type]
    if loaded is None and (wrong or status.get("last_checkpoint")):
        wrong = wrong or [f"{directory.checkpoints}: step {status['last_checkpoint']} was saved and is gone"]
        raise CheckpointError(
            "\n".join(
                [
                    *wrong,
                    f"No checkpoint of {directory.path} is valid, and a run never starts over in silence.",
                ]
            )
            + f"\nTo train anew with its settings: python -m runner repeat={directory.path}"
        )
    if loaded is not None:
        said += [f"damaged, not used: {line}" for line in wrong]
    return run_id, loaded, said


def _judge_changes(start: Start, step: int) -> list[str]:
    assert start.source is not None
    where = start.source.run / "config.yaml"
    stored = config.from_dict(RunDirectory(start.source.run).read_config(), str(where))
    changed = config.changes_on_resume(config.complete(stored), start.config, step)
    return [f"changed on resume: {name} {old} -> {new}" for name, (old, new) in sorted(changed.items())]


def _open_record(start: Start, found: Found | None) -> Record:
    settings, directory = start.config, start.directory
    chosen = settings.checkpoint
    record = Record(
        directory,
        Store(directory.checkpoints, start.run_id),
        Policy(chosen.keep_last, chosen.keep_best, chosen.keep_every),
        loggers.build(settings.loggers),
    )
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
        started=before.get("started", now()),
        resumed=[*before.get("resumed", []), now()] if start.source and not start.source.branch else None,
        parent=str(start.source.checkpoint) if start.source and start.source.branch else before.get("parent"),
        last_checkpoint=found.loaded.checkpoint.step if found and record.source_step is not None else None,
    )
    record.open(
        *(
            (restored.metrics_offset, restored.samples_offset, restored.seconds, restored.progress.step)
            if restored
            else ()
        )
    )
    return record


def _train(start: Start, blas: BlasReport, found: Found | None, record: Record, stops: Stops) -> float | None:
    settings = start.config
    mx.reset_peak_memory()
    if settings.train.cache_limit_gb is not None:
        mx.set_cache_limit(int(settings.train.cache_limit_gb * 1e9))
    if not on_cpu():
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        maybe_set_recommended_wired_limit()
    with Display(start.directory.log, settings.train.iters, lambda: mx.get_peak_memory() / 1e9) as display:
        for line in [blas.advice] if blas.advice else []:
            display.line(line, "yellow")
        parts = _load(settings, start.stored, blas, display)
        try:
            job = _job(start, found, parts, record, stops, display)
            with checkpointed(parts.adapted.model.layers, settings.train.grad_checkpoint):
                _sample(job, parts, settings, before=True)
                job.display.begin(job.members[0].progress.step, settings.train.stop_at)
                ending = train(job)
            job.display.stop()
            _close(job, parts, start, ending)
        finally:
            parts.adapted.remove()
    if stops.signal is not None:
        raise SystemExit(128 + stops.signal)
    return job.members[0].progress.best_loss


def _load(settings: Config, stored: dict[str, Any], blas: BlasReport, display: Display) -> Parts:
    base = load(settings.model)
    base.source = stored["model"]["path"]  # as written: a path from the environment is not written out
    for note in base.notes:
        display.line(note)
    reading = Reading(
        format=settings.data.format,
        mask_prompt=settings.data.mask_prompt,
        max_length=settings.data.max_length,
        on_too_long=settings.data.on_too_long,
        keys=Keys(**vars(settings.data.keys)),
        chat_template=settings.data.chat_template,
    )
    data = load_splits(settings.data.path, base.tokenizer, reading)
    adapted = Adapted(base, settings.lora, settings.seed)
    try:
        _introduce(settings, base, data, adapted, blas, display)
    except BaseException:
        adapted.remove()
        raise
    return Parts(base, data, reading, adapted, _identity(settings, stored, base, data, blas))


def _introduce(
    settings: Config, base: Base, data: DataSet, adapted: Adapted, blas: BlasReport, display: Display
) -> None:
    ours, all_ = trainable_share(adapted)
    device = "CPU" if on_cpu() else "GPU"
    product = f", {blas.kind} BLAS, {blas.threads} threads" if blas.threads and on_cpu() else ""
    display.line(
        f"model  {base.source}: {all_ / 1e6:.1f}M parameters, {ours / 1e6:.3f}M trained in the last "
        f"{adapted.num_layers} of {len(adapted.model.layers)} blocks ({device}{product})"
    )
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


def _identity(settings: Config, stored: dict[str, Any], base: Base, data: DataSet, blas: BlasReport) -> Identity:
    flat = config.flatten(settings)
    frozen = {name: value for name, value in flat.items() if not config.is_free_on_resume(name)}
    return Identity(
        run_id="",
        fingerprints={
            "model": base.fingerprint,
            "data_train": data.train.fingerprint,
            "data_valid": data.valid.fingerprint,
            "config": hashlib.sha256(json.dumps(frozen, sort_keys=True, default=str).encode()).hexdigest(),
        },
        environment={
            "runner": __version__,
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": str(mx.default_device()),
            "blas": blas_identity(blas),
            "compiled": _compiled(settings),
        },
        hyperparameters=config.flatten_dict(stored),
    )


def _compiled(settings: Config) -> bool:
    wanted = settings.train.compile
    return wanted == "always" or (wanted == "auto" and not on_cpu())


def _job(start: Start, found: Found | None, parts: Parts, record: Record, stops: Stops, display: Display) -> Job:
    settings, data = start.config, parts.data
    member = _member(settings, parts, record)
    position = Position()
    for line in found.said if found else []:
        display.line(line, "yellow")
    if found is not None:
        _compare(found, parts.identity, display)
        state.restore(member, found.restored, str(found.loaded.checkpoint.path))
        position = found.restored.position
        display.line(f"resumed from {found.loaded.checkpoint.path} at step {member.progress.step}")
    elif start.source is not None:
        display.line("resumed before the first checkpoint: from the beginning")
    if settings.adapter and found is None:
        member.params = warm_start(member.params, read_weights(Path(settings.adapter)), settings.adapter)
        display.line(f"warm start from {settings.adapter}")
    forward = Forward(parts.adapted.model)
    t = settings.train
    return Job(
        plan=events.Plan(
            iters=t.iters,
            report_every=t.report_every,
            eval_every=t.eval_every,
            evaluates=len(data.valid) > 0,
            stop_at=t.stop_at,
            patience=t.early_stopping.patience,
            min_delta=t.early_stopping.min_delta,
        ),
        saves=Schedule(settings.checkpoint.every, settings.checkpoint.every_minutes),
        members=[member],
        position=position,
        order=Order(data.train.lengths, t.batch_size, settings.seed, settings.data.window),
        train_rows=data.train,
        pad_to=settings.data.pad_to,
        grad_accumulation=t.grad_accumulation,
        valid_batches=_fixed_batches(data.valid, settings),
        adapted=parts.adapted,
        forward=forward,
        step=Step(parts.adapted, forward, grad_clip=t.grad_clip, compiled=_compiled(settings)),
        identity=parts.identity,
        stops=stops,
        display=display,
    )


def _member(settings: Config, parts: Parts, record: Record) -> Member:
    params = parts.adapted.params()
    o, s = settings.optimizer, settings.schedule
    iters = s.iters or settings.train.iters

    def rate(update: int) -> float:
        return learning_rate(update, name=s.name, peak=o.learning_rate, iters=iters, warmup=s.warmup, end=s.end or 0.0)

    return Member(params, optimizers.build(o, params), rate, settings.seed, record)


def _fixed_batches(rows: TokenSet, settings: Config) -> list[Batch]:
    chosen = evaluation_batches(rows.lengths, settings.train.batch_size, settings.train.eval_batches)
    return [make_batch(rows, indices, settings.data.pad_to) for indices in chosen]


def _compare(found: Found, now_: Identity, display: Display) -> None:
    """Refuse another model or other data; name what may change bits."""
    then = found.restored.identity
    words = {
        "model": "the base model has other weights",
        "data_train": "the training data are others",
        "data_valid": "the validation data are others",
    }
    problems = [
        f"{text}: fingerprint {then.fingerprints.get(name, 'none')[:16]} when it was saved, {now_.fingerprints[name][:16]} now."
        for name, text in words.items()
        if then.fingerprints.get(name) != now_.fingerprints[name]
    ]
    if problems:
        problems.append("To train on them from here: adapter=RUN/adapters starts a new run from these weights.")
        raise ConfigError(f"{found.loaded.checkpoint.path} cannot go on here:\n" + "\n".join(problems))
    for name, value in now_.environment.items():
        if then.environment.get(name) != value:
            display.line(
                f"bits may differ from an uninterrupted run: {name} was {then.environment.get(name)}, is {value}",
                "yellow",
            )


def _sample(job: Job, parts: Parts, settings: Config, *, before: bool) -> None:
    """Generate the held-out rows and score them: before the first update, or with the result."""
    member, wanted = job.members[0], settings.data.metric_rows
    if not wanted or settings.data.metric is None or (before and member.progress.step > 0) or job.stops.signal:
        return
    split = settings.data.metric_split
    rows = [row.value for row in parts.data.rows[split]]
    rows = rows if wanted < 0 else rows[:wanted]
    if not rows:
        raise ConfigError(f"data.metric_rows={wanted}: the data have no {split} rows to generate from.")
    job.step.place(member.params)
    job.display.line(f"generating {len(rows)} {split} rows {'before' if before else 'after'} training")
    try:
        made = generate(
            parts.adapted.model,
            parts.base.tokenizer,
            rows,
            parts.reading,
            metric_named(settings.data.metric),
            max_tokens=settings.data.max_new_tokens,
            each=job.stops.check,
        )
    except Interrupted:
        return
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


def _close(job: Job, parts: Parts, start: Start, ending: str) -> None:
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
    record.metrics.sync()
    record.samples.sync()
    named = finished and ending != FINISHED
    record.status(
        state="finished" if finished else "stopped",
        step=progress.step,
        reason=ending if named or not finished else None,
        result_step=result,
        best=best_of(member),
        ended=now(),
    )
    for line in lines:
        job.display.line(line)
    source = parts.base.source
    elsewhere = None if source.startswith("builtin:") or source.endswith(".gguf") else source
    job.display.line("")
    for line in summary.ending(
        start.directory.path,
        state="finished" if finished else "stopped",
        reason=ending if named or not finished else "finished",
        step=progress.step,
        iters=settings.train.iters,
        seconds=record.seconds(),
        tokens=progress.tokens,
        baseline=progress.baseline_loss,
        best=best_of(member),
        result_step=result,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
        adapters_load_elsewhere=elsewhere,
    ):
        job.display.line(line)


def _final_rows(job: Job, parts: Parts, settings: Config, result: int | None) -> list[str]:
    """Test loss and generated answers of the result, where they are asked for."""
    member = job.members[0]
    if result is not None:
        loaded = member.record.store.load(member.record.store.folder / f"step-{result:07d}")
        member.params = state.read(loaded).params
    lines = []
    step = member.progress.step
    if settings.train.test:
        if not len(parts.data.test):
            raise ConfigError("train.test=true: the data have no test.jsonl.")
        job.step.place(member.params)
        tested = evaluate(parts.adapted.model, job.forward, _fixed_batches(parts.data.test, settings))
        member.record.row(
            step=step,
            split="test",
            loss=tested.loss,
            perplexity=math.exp(min(tested.loss, 700)),
            of_step=result,
        )
        lines.append(f"test loss {tested.loss:.4f}, perplexity {math.exp(min(tested.loss, 700)):.3f}")
    if settings.data.metric_rows and settings.data.metric:
        _sample(job, parts, settings, before=False)
        before = rows_of_step(member.record.directory.samples, 0)
        after = rows_of_step(member.record.directory.samples, step)
        if after:
            picked = summary.pick_samples(before, after)
            lines += summary.before_and_after(
                settings.data.metric,
                len(after),
                float(np.mean([row["score"] for row in before.values()])) if before else None,
                float(np.mean([row["score"] for row in after.values()])),
                [(before.get(row), after[row]) for row in picked],
            )
    return lines
