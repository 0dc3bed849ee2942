"""What a search decides, simulated: each job has the loss that a function of its trial and step gives."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runner.common.errors import ConfigError
from runner.runs.search_record import DIVERGED, FAILED, FINISHED, PAUSED, Result, SearchRecord, SearchRecordWriter
from runner.sweeps.search.budget import affordable_trials, missed_targets, seconds_to_come
from runner.sweeps.search.decide import next_wave
from runner.sweeps.search.state import Clock, SearchState, Targets, Trial
from runner.sweeps.search.time_account import TimeAccount
from runner.sweeps.search.wave_planner import WavePlanner

RUNGS = [20, 60, 180]


def loss(number: int, step: int) -> float:
    return (number * 7 % 11) + 10 / step


class Simulation:
    def __init__(self, pruner: str = "halving", trials: int = 9, *, at_once: int = 1, budget=None, **targets: int):
        rungs = RUNGS if pruner != "none" else RUNGS[-1:]
        self.state = SearchState(pruner, 3, rungs, maximize=False, learns=False, at_once=at_once, seed=0)
        self.targets = Targets(trials, budget, targets.get("seeds", 1), targets.get("finalists", 3))
        self.seconds = 0.0
        self.waves = []
        self.failing: set[int] = set()
        self.diverging: set[int] = set()

    def clock(self) -> Clock:
        left = None if self.targets.budget_seconds is None else self.targets.budget_seconds - self.seconds
        return Clock(left, 1.0 if self.waves else None, 0.5)

    def run(self) -> list[tuple[int, int]]:
        """Run to the end and return (trial, step) of the results, in order."""
        done = []
        while True:
            if self.state.pruner == "halving" and self.targets.budget_seconds is not None and self.state.trials:
                self.state.affordable = affordable_trials(self.state, self.targets, self.clock())
            wave = next_wave(self.state, self.targets, self.clock())
            if wave is None:
                return done
            self.waves.append(wave)
            jobs = []
            for _ in range(wave.asked):
                number = len(self.state.trials)
                self.state.trials.append(Trial(number, number, {}, stop_at=self.state.first_rung))
                jobs.append((number, 0))
            for decision in wave.continued:
                for number in decision.trials:
                    self.state.trials[number].stop_at = decision.to_step
                    jobs.append((number, decision.from_step))
            for number, before in jobs:
                trial = self.state.trials[number]
                state = FINISHED if trial.stop_at == RUNGS[-1] else PAUSED
                value = loss(number, trial.stop_at)
                result = Result(trial.stop_at, (value,), state, value)
                if number in self.failing | self.diverging:
                    result = Result(before, (), FAILED if number in self.failing else DIVERGED)
                trial.results.append(result)
                done.append((number, trial.stop_at))
            for number, seed in wave.replicates:
                self.state.trials[number].replicates[seed] = 100 + len(self.state.trials[number].replicates)
            updates = max([self.state.trials[number].stop_at - before for number, before in jobs], default=180)
            count = len(jobs) + len(wave.replicates)
            self.seconds += math.ceil(count / self.state.at_once) * (0.5 + updates)


def finished(simulation: Simulation) -> list[int]:
    return [trial.number for trial in simulation.state.trials if trial.is_finished]


def test_halving_trains_all_to_the_first_rung_a_third_to_the_second_and_the_best_to_the_end():
    simulation = Simulation()
    done = simulation.run()
    best = sorted(range(9), key=lambda number: loss(number, 20))
    assert done == [(n, 20) for n in range(9)] + [(n, 60) for n in best[:3]] + [(best[0], 180)]


def test_more_trials_later_give_what_they_give_at_once():
    later, at_once = Simulation(trials=9), Simulation(trials=18)
    later.run()
    later.targets = replace(later.targets, trials=18)
    later.run()
    at_once.run()

    def reached(simulation: Simulation) -> dict[int, int]:
        return {trial.number: trial.results[-1].step for trial in simulation.state.trials}

    # Those that the first nine sent further stay there.
    assert all(step >= reached(at_once)[number] for number, step in reached(later).items())
    assert set(finished(at_once)) <= set(finished(later))


def test_asynchronous_halving_continues_a_trial_as_soon_as_it_is_in_the_best_third():
    simulation = Simulation("asha")
    done = simulation.run()
    assert done[:4] == [(0, 20), (1, 20), (2, 20), (0, 60)]
    for number, step in done:  # a trial continues from where it was
        if step != 20:
            assert (number, RUNGS[RUNGS.index(step) - 1]) in done
    assert finished(simulation) == [0]


def test_asynchronous_halving_fills_as_many_places_as_there_are():
    simulation = Simulation("asha", trials=12, at_once=4)
    simulation.run()
    assert all(wave.asked + sum(len(d.trials) for d in wave.continued) <= 4 for wave in simulation.waves)
    assert simulation.waves[0].asked == 4
    assert len(finished(simulation)) >= 1


def test_a_failed_trial_does_not_count_at_its_rung_and_is_not_continued():
    simulation = Simulation()
    simulation.failing = {0, 8}
    done = simulation.run()
    assert {number for number, step in done if step > 20} & {0, 8} == set()
    assert len([number for number, step in done if step == 60]) == 2  # a third of seven


def test_a_diverged_trial_counts_at_its_rung_and_is_not_continued():
    simulation = Simulation()
    simulation.diverging = {1, 2, 3, 4, 5, 6}
    done = simulation.run()
    assert {number for number, step in done if step > 20} == {0, 7, 8}  # a third of nine


def test_where_every_trial_fails_the_search_ends():
    simulation = Simulation()
    simulation.failing = set(range(9))
    assert len(simulation.run()) == 9


def test_without_a_pruner_every_trial_is_trained_to_its_end():
    simulation = Simulation("none", trials=4)
    assert simulation.run() == [(n, 180) for n in range(4)]


@pytest.mark.parametrize("pruner", ["halving", "asha", "none"])
@pytest.mark.parametrize("budget", [400.0, 700.0, 1500.0, 3000.0])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_budget_is_kept_used_and_ends_with_a_trial_at_its_end(pruner, budget, at_once):
    simulation = Simulation(pruner, trials=60, budget=budget, at_once=at_once)
    simulation.run()
    assert finished(simulation)
    assert simulation.seconds <= budget + 181 * (pruner == "none")  # the first wave is begun unmeasured
    best = simulation.state.best_first()[0]
    assert best.is_finished
    another = {"halving": 2 * 180, "asha": 180, "none": 181}[pruner]
    assert simulation.seconds >= min(budget - another, 0.5 * budget) or len(simulation.state.trials) == 60


def test_a_budget_without_room_for_one_trial_is_refused_after_its_speed_is_known():
    simulation = Simulation(budget=100.0)
    with pytest.raises(ConfigError, match="does not hold one trial of 180 updates"):
        simulation.run()
    assert len(simulation.state.trials) == 1


@pytest.mark.parametrize("pruner", ["halving", "none"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_the_time_that_a_search_takes_is_known_after_its_first_trial(pruner, seeds):
    simulation = Simulation(pruner, seeds=seeds)
    simulation.state.trials = [Trial(0, 0, {})]
    clock = Clock(None, 1.0, 0.5)
    estimated = seconds_to_come(simulation.state, simulation.targets, clock)
    simulation.state.trials = []
    simulation.run()
    first = clock.seconds(simulation.state.first_rung)
    assert first + estimated == simulation.seconds


@pytest.mark.parametrize(
    "budget, missed",
    [
        (None, []),
        (1000.0, ["seed 2 of trial 0", "seed 2 of trial 8"]),
        (450.0, ["seeds 1, 2 of trial 0", "trial 8 from 60 to its end, and its seeds 1, 2"]),
        (300.0, ["4 of 9 trials", "seeds 1, 2 of trial 0", "trial 2 from 20 to its end, and its seeds 1, 2"]),
    ],
)
def test_what_a_budget_leaves_out_is_named(budget, missed):
    simulation = Simulation(seeds=3, finalists=2, budget=budget)
    simulation.run()
    assert missed_targets(simulation.state, simulation.targets) == missed


def test_finalists_are_trained_to_their_end_and_with_every_seed():
    simulation = Simulation(seeds=3, finalists=2)
    simulation.run()
    best = simulation.state.best_first()[:2]
    assert len(finished(simulation)) == 2
    assert [len(wave.replicates) for wave in simulation.waves[-2:]] == [0, 4]  # the second finalist, then the seeds
    assert [sorted(trial.replicates) for trial in best] == [[1, 2], [1, 2]]
    assert len(simulation.waves[-1].replicates) == 4


def test_repeated_suggestions_end_the_asking_and_the_search_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = SearchState("none", 3, [180], maximize=False, learns=True, at_once=1, seed=0)
    state.trials = [Trial(0, 0, {}, results=[Result(180, (1.0,), FINISHED, 1.0)], stop_at=180)]
    state.trials += [Trial(number, 0, {}, repeats=0) for number in range(1, 20)]
    targets, record = Targets(30, None, 1, 3), SearchRecord()
    with closing(SearchRecordWriter(tmp_path, record)) as writer:
        planner = WavePlanner(state, targets, TimeAccount(record, writer, None), record, writer)
        planner.record_repetition()
        assert next_wave(state, targets, Clock()) is not None and not capsys.readouterr().out
        state.trials.append(Trial(20, 0, {}, repeats=0))
        assert next_wave(state, targets, Clock()) is None
        planner.record_repetition()
        planner.record_repetition()  # as a resume does
    said = "1 of 30 trials were tried: the last 20 suggestions repeated earlier ones"
    assert capsys.readouterr().out.count(f"{said}. A new search with hydra.sweeper.sampler=grid tries every") == 2
    assert [(line["planned"], line["reason"]) for line in record.planned] == [({"trials": 1}, said)]
