"""A search from its first suggestion to its end: decide, launch, measure, tell the sampler, and decide again.

Everything that is decided and measured is recorded before the next decision. A search that is resumed goes through what
is recorded, without launching it again, and continues where the record ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from runner.common.commands import resume_command
from runner.common.errors import ConfigError, RunnerError
from runner.common.text import relative_path, single_line
from runner.runs.objective import Objective
from runner.runs.search_record import DIVERGED, FAILED, FINISHED, NAME, PAUSED, Result, SearchRecord, SearchRecordWriter
from runner.sweeps.search import rungs as rung_rules
from runner.sweeps.search.jobs import TrialJobs
from runner.sweeps.search.lines import continued_text, read_wave, result_line, wave_line
from runner.sweeps.search.outcome import Outcome, read_outcome, read_progress
from runner.sweeps.search.state import SearchState, Targets, Trial, Wave
from runner.sweeps.search.study import Study
from runner.sweeps.search.time_account import TimeAccount
from runner.sweeps.search.wave_planner import WavePlanner
from runner.training.signals import StopSignals

_MAX_STARTS = 3
"""How often a job is started whose process ends without a reason of its own."""
_MAX_FAILURES = 3
"""Trials in a row that fail, after which the search ends: the next ones would fail as well."""


class SearchFailed(RunnerError):
    """Raised where trial after trial fails, or one does with hydra.launcher.fail_fast."""


class _Damaged(ConfigError):
    """Raised where the record cannot be that of this search."""


class Search:
    """The trials of one search."""

    def __init__(
        self,
        state: SearchState,
        targets: Targets,
        *,
        study: Study,
        jobs: TrialJobs,
        objective: Objective,
        record: SearchRecord,
        writer: SearchRecordWriter,
        signals: StopSignals,
    ) -> None:
        """Start with an empty `state`: `run` fills it from the record. `signals`: those that come between jobs."""
        self._state = state
        self._study, self._jobs, self._objective = study, jobs, objective
        self._record, self._writer = record, writer
        self._recorded_waves = len(record.waves)
        self._wave = 0
        self._failures = 0
        """Trials in a row that failed."""
        self._failed_fast = ""
        """What failed, where the launcher has fail_fast."""
        self._account = TimeAccount(record, writer, targets.budget_seconds)
        self._planner = WavePlanner(state, targets, self._account, record, writer)
        self._signals = signals

    def run(self) -> None:
        """Train trials until the search is complete, or its budget is used.

        Raises:
            SearchFailed: trial after trial fails, or one does with hydra.launcher.fail_fast.
            ConfigError: the record does not fit what the sampler suggests, or the budget does not hold one trial.
            SystemExit: a signal stopped it; it can be resumed.
        """
        self._account.add_killed_wave(self._jobs.last_written(), self._jobs.progress())
        for recorded in list(self._record.waves):
            self._run_wave(read_wave(recorded))
        self._train_missing()
        while (wave := self._planner.next_wave()) is not None:
            self._writer.append(wave_line(self._wave, wave))
            for decision in wave.continued:
                print(continued_text(decision), flush=True)
            self._run_wave(wave)
            if self._wave == 1:
                self._planner.print_estimate()
        self._stop_paused()
        self._planner.record_repetition()
        self._planner.record_missed()

    def _train_missing(self) -> None:
        """Train to their end once more the trials that were there already, and whose folder is gone since."""
        gone = [
            t for t in self._state.counted if t.is_finished and t.job is not None and not self._jobs.has_begun(t.job)
        ]
        for trial in gone:
            print(
                f"trial {trial.number}: the folder of its job {trial.job} is gone, so it is trained again", flush=True
            )
        self._launch({trial.job: self._state.end for trial in gone if trial.job is not None})

    def _run_wave(self, wave: Wave) -> None:
        """Launch what was decided, record the results and tell them to the sampler."""
        self._stop_if_asked()
        self._wave += 1
        trials = self._suggest(wave.asked)
        for decision in wave.continued:
            for number in decision.trials:
                self._state.trials[number].stop_at = decision.to_step
                trials.append(self._state.trials[number])
        stops = {t.job: t.stop_at for t in trials if t.job is not None and self._recorded_result(t) is None}
        seeds = [self._add_replicate(number, seed) for number, seed in wave.replicates]
        self._writer.sync()  # what the jobs are for is there before the jobs are
        ends = {job: step if step < self._state.end else None for job, step in stops.items()}
        self._jobs.record({**ends, **dict.fromkeys(seeds)})
        if seeds:
            self._train_seeds(wave.replicates, seeds)
        if trials:
            self._measure(trials, stops)

    def _train_seeds(self, replicates: Sequence[tuple[int, int]], jobs: Sequence[int]) -> None:
        """Train trials with other seeds; one that fails is tried again by the next resume."""
        outcomes = self._launch(dict.fromkeys(jobs, self._state.end))
        for (number, seed), job in zip(replicates, jobs, strict=True):
            if job in outcomes and (result := outcomes[job].result).state in (FAILED, DIVERGED):
                print(f"trial {number} with seed {seed} {result.state}: {single_line(result.reason)}", flush=True)
        self._refuse_failed_fast()

    def _suggest(self, count: int) -> list[Trial]:
        """Ask the sampler for trials, and return those that are new."""
        new = []
        for _ in range(count):
            if self._study.exhausted:
                self._state.exhausted = True
                break
            number = len(self._state.trials)
            params = self._study.ask(at_once=count)
            recorded = self._record.trials[number] if number < len(self._record.trials) else None
            if recorded is None and self._wave < self._recorded_waves:
                raise self._damaged(f"wave {self._wave - 1} asked for {count} trials, and trial {number} is not there")
            if recorded is not None and recorded.params != params:
                raise ConfigError(
                    f"trial {number} was recorded with {recorded.params}, and now {params} is suggested: by "
                    "another version of Optuna or of this program, or the record was edited. The versions that began "
                    f"the search (Optuna {self._record.settings.get('optuna')}) continue it; a new one begins with its "
                    f"results by hydra.sweeper.warm_from={relative_path(self._jobs.sweep)}."
                )
            trial, reason = Trial(number, None, params, stop_at=self._state.first_rung), "no run can have its settings"
            if recorded is not None and (recorded.job is None or self._jobs.has(recorded.job)):
                trial.job = recorded.job  # whatever its config would be composed to today
            else:
                try:
                    trial.job = self._jobs.find_or_plan(params).number
                    if recorded is not None and recorded.job != trial.job:
                        raise self._damaged(f"trial {number} has job {recorded.job}, and there is no such job")
                except _Damaged:
                    raise
                except ConfigError as error:
                    reason = single_line(str(error))
                    print(f"trial {number} cannot run: {reason}", flush=True)
            same = (other.number for other in self._state.counted if other.job == trial.job is not None)
            trial.repeats = next(same, None)
            self._state.trials.append(trial)
            if recorded is None:
                self._writer.append({"trial": number, "job": trial.job, "params": params})
            self._study.describe(number, {"job": trial.job})
            if trial.job is None:
                self._add_result(trial, Result(0, (), FAILED, reason=reason))
            elif trial.repeats is not None:
                self._study.fail(number)  # the sampler learns from the earlier trial
            else:
                new.append(trial)
        return new

    def _damaged(self, problem: str) -> ConfigError:
        return _Damaged(f"{self._jobs.sweep / NAME}: {problem}.")

    def _add_replicate(self, number: int, seed: int) -> int:
        trial = self._state.trials[number]
        assert trial.job is not None
        job = self._jobs.find_or_plan_seed(trial.job, seed).number
        trial.replicates[seed] = job
        if seed not in self._record.trials[number].replicates:
            self._writer.append({"replicate": number, "job": job, "seed": seed})
        return job

    def _measure(self, trials: list[Trial], stops: Mapping[int, int]) -> None:
        """Train jobs to these steps, and record and tell what the trials have there; recorded results are told."""
        outcomes = self._launch(stops)
        results = {trial.number: outcomes[trial.job].result for trial in trials if trial.job in outcomes}
        if results and all(result.state == FAILED for result in results.values()):
            self._failures += len(results)
            if self._failures >= _MAX_FAILURES and self._wave > self._recorded_waves:
                reason = list(results.values())[-1].reason
                raise SearchFailed(
                    f"{self._failures} trials in a row failed, the last one: {reason}\n"
                    "The search ends here, since the next ones would fail as well. This tries the last ones again: "
                    f"{resume_command(self._jobs.sweep)}"
                )
        elif results:
            self._failures = 0
        for trial in trials:
            result = self._recorded_result(trial) or results.get(trial.number)
            if result is not None:  # or else fail_fast ends the search below
                self._add_result(trial, result)
        self._writer.sync()
        self._refuse_failed_fast()

    def _recorded_result(self, trial: Trial) -> Result | None:
        if trial.number >= len(self._record.trials):
            return None
        recorded = self._record.trials[trial.number].results
        return recorded[len(trial.results)] if len(recorded) > len(trial.results) else None

    def _launch(self, stops: Mapping[int, int]) -> dict[int, Outcome]:
        """Train jobs to these steps and return what they have there, by number of the job.

        With hydra.launcher.fail_fast a job that failed, and those that were not started then, have nothing.
        """
        left, outcomes, start, was_launched = dict(stops), {}, time.monotonic(), False
        before = {job: read_progress(self._jobs.folder(job)) for job in stops}
        for attempt in range(1, _MAX_STARTS + 1):
            if not left or self._failed_fast:
                break
            self._stop_if_asked()
            launched = self._jobs.launch(list(left))
            was_launched |= launched.any_started
            self._failed_fast = launched.failed_fast
            for job, step in left.items():
                is_last = step >= self._state.end
                outcomes[job] = read_outcome(self._jobs.folder(job), step, self._objective, is_last=is_last)
            left = {job: step for job, step in left.items() if outcomes[job].interrupted and attempt < _MAX_STARTS}
        if was_launched:
            progress = [read_progress(self._jobs.folder(job)) - before[job] for job in stops]
            self._account.add_launch(time.monotonic() - start, progress, self._state.at_once)
        if self._failed_fast:
            outcomes = {job: outcome for job, outcome in outcomes.items() if outcome.result.state != FAILED}
        return outcomes

    def _refuse_failed_fast(self) -> None:
        """End the search where a job failed with hydra.launcher.fail_fast."""
        if self._failed_fast:
            raise SearchFailed(
                f"{self._failed_fast}\nhydra.launcher.fail_fast ends the search here. This continues it, and tries "
                f"again what failed: {resume_command(self._jobs.sweep)}"
            )

    def _stop_if_asked(self) -> None:
        """End with the exit code of a signal that came while no job ran."""
        if self._signals.signal is not None:
            raise SystemExit(128 + self._signals.signal)

    def _add_result(self, trial: Trial, result: Result) -> None:
        """Add the next result of a trial, record it unless it is recorded, and tell the sampler."""
        if self._recorded_result(trial) is None:
            self._writer.append(result_line(trial.number, result))
        trial.results.append(result)
        if result.state == PAUSED:
            lower_is_better = -result.values[0] if self._state.maximize else result.values[0]
            self._study.report(trial.number, result.step, lower_is_better)
        elif result.state == FINISHED:
            self._study.finish(trial.number, result.values)
        elif result.state == DIVERGED:
            self._study.diverge(trial.number, result.step)
        else:
            self._study.fail(trial.number)

    def _stop_paused(self) -> None:
        """Record of each trial that waits why it is not continued."""
        for trial in self._state.counted:
            if not trial.is_paused:
                continue
            step = trial.results[-1].step
            values = self._state.at_rung(step)
            ranked = rung_rules.rank(values)
            place, value = ranked.index(trial.number) + 1, values[trial.number]
            line = {"stopped": trial.number, "step": step, "place": place, "of": len(ranked), "value": value}
            self._study.stop(trial.number)
            if self._record.trials[trial.number].stopped != line:
                self._writer.append(line)
