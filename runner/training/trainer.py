"""The training loop. Every kind of run passes through it: new, resumed, branched, or a job of a sweep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from runner.backends.protocol import BackendBatch
from runner.checkpoints.save_policy import SavePolicy, StopReason
from runner.common.errors import Diverged, NonFiniteUpdate
from runner.common.text import count
from runner.data.order import BatchOrder
from runner.reports.progress import Display
from runner.training import state_files
from runner.training.components import Components
from runner.training.dataloader import EvaluationLoader, PrefetchingLoader
from runner.training.evaluate import EvaluationResult
from runner.training.memory import BufferCache, memory_usage
from runner.training.methods.method import Method
from runner.training.plan import TrainingPlan
from runner.training.process_limit import ProcessLimit
from runner.training.run_writer import RunWriter
from runner.training.shared_start import keep_equal
from runner.training.signals import StopRequested, StopSignals
from runner.training.train_state import ReportWindow, TrainState, UpdateResult
from runner.training.train_step import TrainStep
from runner.training.world import World

NOTICE_SECONDS = 3.0
"""How long the evaluation before training may take without a line that says so."""


@dataclass(kw_only=True)
class Trainer:
    """Trains one adapter: the loop, and what it reads and writes."""

    plan: TrainingPlan
    save_policy: SavePolicy
    learning_rate: Callable[[int], float]
    """Learning rate of an update, counted from 1."""
    components: Components
    state: TrainState
    order: BatchOrder
    batches: PrefetchingLoader
    valid_batches: EvaluationLoader
    method: Method
    train_step: TrainStep
    writer: RunWriter
    stops: StopSignals
    display: Display
    process_limit: ProcessLimit
    skip_limit: int | None = None
    """How many updates in a row may be skipped because their loss or gradient is not finite; None skips none."""
    buffer_cache: BufferCache
    world: World
    was_unequal: bool = False
    """Whether ranks have come apart."""
    saved_at: float = field(default_factory=time.monotonic)
    """When it last saved, or else started, by `time.monotonic`."""
    train_seconds: float = 0.0
    """Time spent in updates since the last report, without evaluating and saving, in this process."""
    train_tokens: int = 0
    """Tokens trained on in that time; the sums since the last report may hold those of an earlier process, too."""

    def train(self) -> StopReason:
        """Train from the current step until the run ends, and return why it ended.

        Raises:
            Diverged: a loss or a gradient is not finite, and its update cannot be skipped.
            StorageError: a save failed; earlier checkpoints are intact.
            RankLost: another rank is gone; earlier checkpoints are intact.
        """
        self.world.gather()  # from here on ranks agree on stop signals
        self.evaluate_pending()
        stop = self.stop_reason()
        while stop is None:
            self.writer.record_finished_save()
            self.log_messages()
            try:
                self.update()
            except StopRequested:
                stop = self.stop_reason()
                assert stop is not None
                self.save_if_due(False, stop)
                break
            step, is_best = self.state.progress.step, False
            if self.plan.is_report_due(step) and self.state.progress.since_report.updates:
                self.report()
            if self.plan.is_evaluation_due(step):
                is_best = self.evaluate()
            stop = self.stop_reason()  # once per update: the save records the same reason that ends the loop
            self.save_if_due(is_best, stop)
        self.writer.finish_save()
        return stop

    def stop_reason(self) -> StopReason | None:
        """Return why the run ends at the current step, or None if it continues."""
        progress = self.state.progress
        stop = self.plan.stop_reason(progress.step, progress.bad_evaluations, self.stops.signal)
        return StopReason.REPLACE if stop is None and self.process_limit.is_reached() else stop

    def update(self) -> None:
        """Make or skip one optimizer update, and add one that was made to the sums since the last report.

        Raises:
            StopRequested: a stop signal abandoned it, which changes nothing; a method may take long before it computes
                gradients.
        """
        start = time.perf_counter()
        state, progress = self.state, self.state.progress
        batches, next_position = self.batches.load(state.position)
        result = self.update_or_skip(batches)
        state.position = next_position
        progress.step += 1
        self.process_limit.count_update()
        self.buffer_cache.empty_if_half_full()
        seconds = time.perf_counter() - start
        self.train_seconds += seconds
        if result is not None:
            progress.tokens += result.tokens
            progress.since_report.add(result)
            self.train_tokens += result.tokens
            self.display.step(progress.step, result.loss, result.tokens, seconds)

    def update_or_skip(self, batches: Sequence[BackendBatch]) -> UpdateResult | None:
        """Make the next update and return what it computed; None where it was skipped, and not applied."""
        progress = self.state.progress
        try:
            made = self.train_step.update(self.state, batches, self.learning_rate(progress.step + 1))
        except NonFiniteUpdate as error:
            if self.skip_limit is None:
                raise
            if progress.skipped_in_a_row >= self.skip_limit:
                skipped = count(progress.skipped_in_a_row, "update")
                raise Diverged(f"{error} Before it, {skipped} in a row had been skipped.") from None
            progress.skipped_updates += 1
            progress.skipped_in_a_row += 1
            self.display.line(f"{error} Skipped so far: {progress.skipped_updates}", "yellow")
            self.writer.update_status(skipped_updates=progress.skipped_updates)
            return None
        progress.skipped_in_a_row = 0
        return made

    def report(self) -> None:
        """Log the training loss since the last report: the mean over supervised tokens, or over examples."""
        self.keep_ranks_equal()
        progress, sums = self.state.progress, self.state.progress.since_report
        learning_rate = self.learning_rate(progress.step)
        progress.train_loss = sums.loss
        self.log_loss(
            "train",
            progress.train_loss,
            supervised=sums.supervised,
            tokens=self.train_tokens,
            seconds=self.train_seconds,
            learning_rate=learning_rate,
            grad_norm=sums.grad_norm,
            **({} if self.skip_limit is None else {"skipped_updates": progress.skipped_updates}),
            **sums.means(),
        )
        self.writer.update_status(state="running", step=progress.step, train_loss=progress.train_loss)
        self.display.train_loss(progress.step, progress.train_loss, learning_rate)
        progress.since_report = ReportWindow()
        self.train_seconds, self.train_tokens = 0.0, 0

    def keep_ranks_equal(self) -> None:
        """Give ranks whose weights differ from rank 0's in the last digits that one's state; log it once."""
        different = keep_equal(self.world, self.state, self.order.window_batches, self.components)
        if different and not self.was_unequal:
            self.was_unequal = True
            ranks = ", ".join(map(str, different))
            self.display.line(f"ranks  the weights of rank {ranks} differed from rank 0's, which are used", "yellow")

    def evaluate(self) -> bool:
        """Evaluate at the current step and log the result; return whether the loss is the best so far.

        A stop signal abandons the evaluation; the resumed run makes up for it.

        Raises:
            Diverged: the validation loss is not finite.
        """
        progress = self.state.progress
        try:
            result = self.validation_result()
        except StopRequested:
            progress.pending_evaluation = progress.step > 0
            return False
        is_best = progress.add_validation(result.loss, self.plan.min_delta)
        self.log_loss(
            "valid",
            result.loss,
            supervised=result.supervised,
            tokens=result.tokens,
            seconds=result.seconds,
            **result.measures,
        )
        identity = self.method.identity(self.valid_batches.fingerprint)
        self.writer.log_row_losses(progress.step, "valid", identity, result.rows)
        self.writer.update_status(state="running", step=progress.step, valid_loss=result.loss, best=progress.best)
        self.display.valid_loss(progress.step, result.loss, is_best, result.measures)
        return is_best

    def validation_result(self) -> EvaluationResult:
        """Compute the validation loss; before the first update, reuse what an earlier run on this base computed."""
        step, baseline = self.state.progress.step, self.components.baseline
        result = baseline.validation if step == 0 else None
        if result is None:
            batches = self.batches_with_progress(step)
            result = self.method.evaluate(self.state.adapter, "valid", batches, self.stops.check)
        if not math.isfinite(result.loss):
            raise Diverged(f"The validation loss at step {step} is not finite.")
        if step == 0 and baseline.validation is None:
            baseline.validation = result
            baseline.store()
        return result

    def batches_with_progress(self, step: int) -> Iterator[BackendBatch]:
        """Yield the validation batches and show how many rows are done; log a line if the first evaluation is slow."""
        start, done, total = time.monotonic(), 0, self.valid_batches.row_count
        notice_due = step == 0
        for batch in self.valid_batches:
            self.display.busy(f"{step}/{self.plan.iters}  evaluating, {done}/{total} rows")
            if notice_due and time.monotonic() - start > NOTICE_SECONDS:
                self.display.line(f"evaluating {total:,} rows before training")
                notice_due = False
            yield batch
            done += batch.row_count

    def evaluate_pending(self) -> None:
        """Evaluate before the next update: at step 0, or where a stop prevented the evaluation that was due."""
        progress = self.state.progress
        if self.stops.signal is not None:
            return
        if progress.pending_evaluation:
            progress.pending_evaluation = False
            is_best = self.evaluate()
            self.save_if_due(is_best, self.stop_reason())
        elif progress.step == 0 and self.plan.evaluates and progress.baseline_loss is None:
            self.evaluate()

    def save_if_due(self, is_best: bool, stop: StopReason | None) -> None:
        """Save once at this step if the schedule, a new best loss or the end of the loop asks for it."""
        progress, components = self.state.progress, self.components
        save_reasons = self.save_policy.reasons_to_save(
            progress.step,
            minutes_since_save=(time.monotonic() - self.saved_at) / 60,
            best=is_best and self.writer.retention.policy.keep_best > 0,
            stop=stop,
        )
        if not save_reasons or not self.world.is_first:
            return
        files = state_files.checkpoint_files(
            self.state,
            learning_rate=self.learning_rate(progress.step),
            window=self.order.window_batches,
            written=self.writer.positions(),
            identity=components.identity,
            adapted=components.adapted,
        )
        self.writer.save_checkpoint(progress.step, files, save_reasons, progress.current_valid_loss)
        self.saved_at = time.monotonic()

    def log_messages(self) -> None:
        """Print what the backup and the loggers report, such as a missing disk; each message comes once."""
        for line in self.writer.new_messages():
            self.display.line(line, "yellow")

    def log_loss(
        self, split: str, loss: float, *, supervised: int, tokens: int, seconds: float, **fields: float | None
    ) -> None:
        """Append a row to the metrics: a loss, and the tokens and seconds that it was computed from."""
        position, progress, memory = self.state.position, self.state.progress, memory_usage()
        self.writer.log_metrics(
            step=progress.step,
            split=split,
            loss=loss,
            **fields,
            epoch=round(position.epoch + position.batch / self.order.batches_per_epoch, 4),
            tokens=progress.tokens,
            supervised_tokens=supervised,
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            peak_memory_gb=round(memory.peak, 3),
            active_memory_gb=round(memory.active, 3),
            cache_memory_gb=round(memory.cache, 3),
        )
