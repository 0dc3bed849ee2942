"""A search from its first suggestion to its end: decide, launch, measure, tell the sampler, and decide again.

Everything that is decided and measured is recorded before the next decision. A search that is resumed goes through what
is recorded, without launching it again, and continues where the record ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from runner.common.clock import parse_utc
from runner.common.errors import ConfigError, RunnerError
from runner.common.text import single_line
from runner.runs.objective import Objective
from runner.runs.search_record import DIVERGED, FAILED, FINISHED, PAUSED, Result, SearchRecord, SearchRecordWriter
from runner.sweeps.search.decide import (
    Clock,
    SearchState,
    Targets,
    Trial,
    Wave,
    affordable_trials,
    next_wave,
)
from runner.sweeps.search.jobs import TrialJobs
from runner.sweeps.search.lines import continued_text, read_wave, result_line, wave_line
from runner.sweeps.search.outcome import Outcome, Progress, read_outcome, read_progress
from runner.sweeps.search.study import Study

_MAX_STARTS = 3
"""How often a job is started whose process ends without a reason of its own."""
_MAX_FAILURES = 3
"""Trials in a row that fail, after which the search ends: the next ones would fail as well."""


class SearchFailed(RunnerError):
    """Raised where trial after trial fails."""


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
    ) -> None:
        """Start with an empty `state`: `run` fills it from the record."""
        self._state, self._targets = state, targets
        self._study, self._jobs, self._objective = study, jobs, objective
        self._record, self._writer = record, writer
        self._recorded_waves = len(record.waves)
        self._wave = 0
        self._is_planned = False
        """Whether how many trials the budget holds is recorded."""
        self._has_launched = False
        """Whether this process has launched jobs: the first launch loads what the others share."""
        self._failures = 0
        """Trials in a row that failed."""
        self._spent_before, self._started = record.spent_seconds, time.monotonic()

    def run(self) -> None:
        """Train trials until the search is complete, or its budget is used.

        Raises:
            SearchFailed: trial after trial fails.
            ConfigError: the record does not fit what the sampler suggests, or the budget does not hold one trial.
            SystemExit: a signal stopped it; it can be resumed.
        """
        if lost := self._seconds_before_kill():
            self._spent_before += lost
            self._add_time()
        for recorded in list(self._record.waves):
            self._carry_out(read_wave(recorded))
        self._state.planned = self._planned_trials()
        self._is_planned = self._state.planned is not None
        while (wave := self._next_wave()) is not None:
            self._writer.append(wave_line(self._wave, wave))
            for decision in wave.continued:
                print(continued_text(decision), flush=True)
            self._carry_out(wave)
        self._stop_paused()

    def _next_wave(self) -> Wave | None:
        """Decide what to launch next; where the budget holds fewer trials than are wanted, record how many it holds."""
        state, targets, clock = self._state, self._targets, self._clock()
        if state.pruner == "halving" and clock.seconds_left is not None and not self._is_planned:
            count = len(state.counted)
            state.planned = affordable_trials(state, targets, clock) if count else None
            if state.planned is not None and count >= state.planned < targets.trials:
                self._is_planned = True
                reason = f"the budget holds {count} trials at {clock.per_update or 0.0:.3g} s an update"
                if clock.seconds_left <= 0:
                    reason = f"the budget is used, after {count} trials"
                print(reason, flush=True)
                self._writer.append({"planned": {"trials": count}, "wave": self._wave, "reason": reason})
        return next_wave(state, targets, clock)

    def _planned_trials(self) -> int | None:
        """Return how many trials were planned for the present options, where that is recorded."""
        planned = None
        for line in self._record.lines:
            if "extended" in line:
                planned = None
            elif "planned" in line:
                planned = int(line["planned"]["trials"])
        return planned

    def _clock(self) -> Clock:
        """Return the time that is left, and how long jobs take as measured so far."""
        record, budget = self._record, self._targets.budget_seconds
        left = None if budget is None else budget - self._spent()
        if not record.updates:
            return Clock(left)
        per_start = record.beside_seconds / record.starts if record.starts else 0.0
        return Clock(left, record.job_seconds / record.updates, per_start)

    def _seconds_before_kill(self) -> float:
        """Return how long the last wave was in progress where the process was killed in it, by what its jobs wrote."""
        record = self._record
        if not record.waves or any("spent" in line for line in _lines_since_last_wave(record)):
            return 0.0
        begun = parse_utc(record.waves[-1].get("time"))
        return max(0.0, self._jobs.last_written() - begun) if begun is not None else 0.0

    def _spent(self) -> float:
        return self._spent_before + time.monotonic() - self._started

    def _carry_out(self, wave: Wave) -> None:
        """Launch what was decided, record the results and tell them to the sampler."""
        self._wave += 1
        trials = self._suggest(wave.asked)
        for decision in wave.continued:
            for number in decision.trials:
                self._state.trials[number].target = decision.end
                trials.append(self._state.trials[number])
        targets = {t.job: t.target for t in trials if t.job is not None and self._recorded_result(t) is None}
        seeds = [self._add_replicate(number, seed) for number, seed in wave.replicates]
        self._writer.sync()  # what the jobs are for is there before the jobs are
        ends = {job: step if step < self._state.end else None for job, step in targets.items()}
        self._jobs.record({**ends, **dict.fromkeys(seeds)})
        if seeds:
            self._launch(dict.fromkeys(seeds, self._state.end))
        if trials:
            self._measure(trials, targets)

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
            if recorded is not None and recorded.params != params:
                raise ConfigError(
                    f"trial {number} was recorded with {recorded.params}, and now {params} is suggested: another "
                    "version of Optuna, or an edited record. With the version that began the search "
                    f"({self._record.settings.get('optuna')}) it continues; a new one begins with its results by "
                    "hydra.sweeper.warm_from=SWEEP."
                )
            trial, reason = Trial(number, None, params, target=self._state.first_rung), "no run can have its settings"
            if recorded is not None and (recorded.job is None or self._jobs.has(recorded.job)):
                trial.job = recorded.job  # whatever its config would be composed to today
            else:
                try:
                    trial.job = self._jobs.find_or_plan(params).number
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
                self._study.fail(number)  # its twin is what the sampler learns from
            else:
                new.append(trial)
        return new

    def _add_replicate(self, number: int, seed: int) -> int:
        trial = self._state.trials[number]
        assert trial.job is not None
        job = self._jobs.find_or_plan_seed(trial.job, seed).number
        trial.replicates[seed] = job
        if seed not in self._record.trials[number].replicates:
            self._writer.append({"replicate": number, "job": job, "seed": seed})
        return job

    def _measure(self, trials: list[Trial], targets: Mapping[int, int]) -> None:
        """Train jobs to their targets, and record and tell what the trials have there; recorded results are told."""
        outcomes = self._launch(targets)
        results = {trial.number: outcomes[trial.job].result for trial in trials if trial.job in outcomes}
        if results and all(result.state == FAILED for result in results.values()):
            self._failures += len(results)
            if self._failures >= _MAX_FAILURES and self._wave > self._recorded_waves:
                reason = list(results.values())[-1].reason
                raise SearchFailed(
                    f"{self._failures} trials in a row failed, the last one: {reason}\n"
                    "The search ends here, since the next ones would fail as well. resume=SWEEP tries the last ones "
                    "again."
                )
        elif results:
            self._failures = 0
        for trial in trials:
            recorded = self._recorded_result(trial)
            self._add_result(trial, recorded or results[trial.number])
        self._writer.sync()

    def _recorded_result(self, trial: Trial) -> Result | None:
        if trial.number >= len(self._record.trials):
            return None
        recorded = self._record.trials[trial.number].results
        return recorded[len(trial.results)] if len(recorded) > len(trial.results) else None

    def _launch(self, targets: Mapping[int, int]) -> dict[int, Outcome]:
        """Train jobs to these steps and return what they have there, by number of the job."""
        left, outcomes, start, launched = dict(targets), {}, time.monotonic(), False
        before = {job: read_progress(self._jobs.folder(job)) for job in targets}
        for attempt in range(1, _MAX_STARTS + 1):
            if not left:
                break
            launched |= self._jobs.launch(list(left))
            for job, step in left.items():
                is_last = step >= self._state.end
                outcomes[job] = read_outcome(self._jobs.folder(job), step, self._objective, is_last=is_last)
            left = {job: step for job, step in left.items() if outcomes[job].interrupted and attempt < _MAX_STARTS}
        if launched:
            after = {job: read_progress(self._jobs.folder(job)) for job in targets}
            self._note_time(time.monotonic() - start, [after[job] - before[job] for job in targets])
        return outcomes

    def _note_time(self, seconds: float, jobs: list[Progress]) -> None:
        """Record the time that was spent, and what it was spent on; `seconds`: that of the launch."""
        in_jobs = sum(job.seconds for job in jobs)
        is_first, self._has_launched = not self._has_launched, True
        beside = max(0.0, seconds * min(len(jobs), self._state.at_once) - in_jobs)
        updates = sum(job.updates for job in jobs)
        self._add_time(in_jobs, updates, *((0.0, 0) if is_first else (beside, len(jobs))))

    def _add_time(self, jobs: float = 0.0, updates: int = 0, beside: float = 0.0, starts: int = 0) -> None:
        record = self._record
        self._writer.append(
            {
                "spent": round(self._spent(), 3),
                "jobs": round(record.job_seconds + jobs, 3),
                "updates": record.updates + updates,
                "beside": round(record.beside_seconds + beside, 3),
                "starts": record.starts + starts,
            }
        )

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
            ranked = sorted(values, key=lambda number: (values[number], number))
            place, value = ranked.index(trial.number) + 1, values[trial.number]
            line = {"stopped": trial.number, "step": step, "place": place, "of": len(ranked), "value": value}
            self._study.stop(trial.number)
            if self._record.trials[trial.number].stopped != line:
                self._writer.append(line)


def _lines_since_last_wave(record: SearchRecord) -> list[dict[str, Any]]:
    last = max(i for i, line in enumerate(record.lines) if "wave" in line and "asked" in line)
    return record.lines[last:]
