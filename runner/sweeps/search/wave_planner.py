"""Which wave comes next as time and budget allow; what the budget decides is recorded."""

from __future__ import annotations

from runner.common.errors import ConfigError
from runner.common.text import count, format_duration
from runner.runs.search_record import MAX_REPEATS, SearchRecord, SearchRecordWriter
from runner.sweeps.search.budget import affordable_trials, missed_targets, seconds_to_come
from runner.sweeps.search.decide import next_wave
from runner.sweeps.search.state import SearchState, Targets, Wave
from runner.sweeps.search.time_account import TimeAccount


class WavePlanner:
    """Decides what is launched next in the time that is left."""

    def __init__(
        self,
        state: SearchState,
        targets: Targets,
        account: TimeAccount,
        record: SearchRecord,
        writer: SearchRecordWriter,
    ) -> None:
        self._state, self._targets, self._account = state, targets, account
        self._record, self._writer = record, writer

    def next_wave(self) -> Wave | None:
        """Return what to launch next; where the budget holds fewer trials than are wanted, record how many it holds.

        Raises:
            ConfigError: the budget does not hold one trial.
        """
        state, targets, clock = self._state, self._targets, self._account.clock()
        state.affordable = self._record.affordable_trials
        made = len(state.counted)
        if state.pruner == "halving" and clock.seconds_left is not None and state.affordable is None and made:
            try:
                state.affordable = affordable_trials(state, targets, clock)
            except ConfigError:
                self.record_missed()
                raise
            if state.affordable <= made < targets.trials:
                reason = f"the budget holds {count(made, 'trial')} at {clock.per_update or 0.0:.3g} s an update"
                if clock.seconds_left <= 0:
                    reason = f"the budget is used, after {count(made, 'trial')}"
                print(reason, flush=True)
                self._writer.append({"planned": {"trials": made}, "wave": len(self._record.waves), "reason": reason})
        return next_wave(state, targets, clock)

    def print_estimate(self) -> None:
        """Print about how long a search without a budget takes, as the first trials say it."""
        clock = self._account.clock()
        if clock.seconds_left is not None or clock.per_update is None:
            return
        seconds = seconds_to_come(self._state, self._targets, clock)
        if seconds >= 1:
            print(f"about {format_duration(seconds)} more at most, at {clock.per_update:.3g} s an update", flush=True)

    def record_repetition(self) -> None:
        """Print and record where the sampler ends the search early: it suggests only what was tried before."""
        made, wanted = len(self._state.counted), self._targets.trials
        if made >= wanted or not self._state.only_repeats:
            return
        tried = f"{made} of {count(wanted, 'trial')} were tried"
        reason = f"{tried}: the last {MAX_REPEATS} suggestions repeated earlier ones"
        print(
            f"{reason}. A new search with hydra.sweeper.sampler=grid tries every combination; one over a larger space "
            "has more to suggest.",
            flush=True,
        )
        if all(line.get("reason") != reason for line in self._record.planned):
            self._writer.append({"planned": {"trials": made}, "wave": len(self._record.waves), "reason": reason})

    def record_missed(self) -> None:
        """Print and record what a complete search would have beside this one, where its budget leaves that out."""
        missed = missed_targets(self._state, self._targets) if self._targets.budget_seconds is not None else []
        if not missed:
            return
        spent, budget = format_duration(self._account.spent), format_duration(self._targets.budget_seconds or 0.0)
        print(f"the budget of {budget}, of which {spent} are used, leaves out: {'; '.join(missed)}", flush=True)
        if missed != self._record.missed:
            self._writer.append({"missed": missed})
