"""The samplers of Optuna by ask and tell, and its journal for optuna-dashboard. The only module that imports Optuna.

A study is never read from the disk: a search that is resumed asks and tells again what its record has, so that the
suggestions which follow are those of a search that was never interrupted. Each suggestion has a random state of its
own, from the seed of the search and the number of the trial.
"""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from runner.common.errors import ConfigError
from runner.config.search_settings import SearchSettings
from runner.runs.search_record import FINISHED, JOURNAL
from runner.sweeps.search.dimensions import Choices, Interval, Value
from runner.sweeps.search.earlier import EarlierResult
from runner.sweeps.search.space import Space

_STUDY = "search"


class Study:
    """Suggests the parameters of trials, and is told what they were measured to have."""

    def __init__(self, folder: Path, settings: SearchSettings, space: Space, maximize: Sequence[bool]) -> None:
        """Start an empty study, with a new journal in `folder`.

        Args:
            folder: directory of the sweep.
            settings: the sampler and its seed.
            space: what is suggested.
            maximize: for each metric whether a higher value is better.

        Raises:
            ConfigError: the sampler needs a package that is not installed, or does not fit the space or the metrics.
        """
        self._settings, self._space = settings, space
        self._distributions = {key: _distribution(dimension) for key, dimension in space.dimensions.items()}
        self._grid = _grid_order(settings, space) if settings.sampler == "grid" else None
        self._trials: list[Trial] = []
        _require_sampler(settings, space, len(maximize))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = folder / JOURNAL
        for left in (journal, journal.with_name(f"{JOURNAL}.lock")):
            if os.path.lexists(left):
                left.unlink()
        self._study = optuna.create_study(
            storage=_PausedAsStopped(JournalFileBackend(str(journal))),
            study_name=_STUDY,
            directions=["maximize" if higher else "minimize" for higher in maximize],
        )

    def ask(self, *, at_once: int = 1) -> dict[str, Value]:
        """Return the parameters of the next trial; `at_once`: how many are asked for before any is told."""
        number = len(self._trials)
        if self._grid is not None:
            params = self._grid[number]
            self._study.enqueue_trial(params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = self._sampler(number, at_once)
            trial = self._study.ask(self._distributions)
        self._trials.append(trial)
        return {key: self._space.dimensions[key].rounded(trial.params[key]) for key in self._space.dimensions}

    @property
    def exhausted(self) -> bool:
        """Whether a grid has no further combination."""
        return self._grid is not None and len(self._trials) >= len(self._grid)

    def describe(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Note facts about a trial for the dashboard."""
        for name, value in attributes.items():
            self._trials[number].set_user_attr(name, value)

    def report(self, number: int, step: int, value: float) -> None:
        """Record the value of a trial at a rung, after which it is paused."""
        self._trials[number].report(value, step)

    def finish(self, number: int, values: Sequence[float]) -> None:
        """Record the values of a trial that was trained to its end."""
        self._study.tell(self._trials[number], list(values))

    def diverge(self, number: int, step: int) -> None:
        """Record that a trial diverged: it counts as worse than any other."""
        if len(self._study.directions) > 1:
            self._study.tell(self._trials[number], state=TrialState.FAIL)
            return
        self._trials[number].report(float("nan"), step)
        self._study.tell(self._trials[number], state=TrialState.PRUNED)

    def fail(self, number: int) -> None:
        """Record that a trial could not be measured: the sampler learns nothing from it."""
        self._study.tell(self._trials[number], state=TrialState.FAIL)

    def stop(self, number: int) -> None:
        """Record that a paused trial is not continued."""
        self._study.tell(self._trials[number], state=TrialState.PRUNED)

    def add_earlier(self, result: EarlierResult) -> None:
        """Add the result of an earlier sweep; raises ValueError where it is no point of the space."""
        params = {key: result.params[key] for key in self._distributions}
        if result.state == FINISHED:
            trial = create_trial(params=params, distributions=self._distributions, values=list(result.values))
        else:
            loss = result.values[0] if result.values else float("nan")
            maximize = self._study.directions[0] == StudyDirection.MAXIMIZE
            trial = create_trial(
                params=params,
                distributions=self._distributions,
                state=TrialState.PRUNED,
                intermediate_values={result.step: -loss if maximize else loss},
            )
        self._study.add_trial(trial)

    def _sampler(self, number: int, at_once: int) -> BaseSampler:
        seed = int.from_bytes(hashlib.blake2b(f"{self._settings.seed}/{number}".encode(), digest_size=4).digest())
        match self._settings.sampler:
            case "tpe":
                return TPESampler(seed=seed, constant_liar=at_once > 1)
            case "cmaes":
                return CmaEsSampler(seed=seed, warn_independent_sampling=False)
            case "qmc":
                return QMCSampler(seed=self._settings.seed, scramble=True, warn_independent_sampling=False)
            case _:
                return RandomSampler(seed=seed)


class _PausedAsStopped(JournalStorage):
    """Presents a paused trial to the sampler as one that was stopped at its last rung, so that it is learnt from.

    In the journal it is running, which it may be again.
    """

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Sequence[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = []
        for trial in super().get_all_trials(study_id, deepcopy=deepcopy):
            if trial.state == TrialState.RUNNING and trial.intermediate_values:
                trial = copy.copy(trial)
                trial.state = TrialState.PRUNED
            if states is None or trial.state in states:
                trials.append(trial)
        return trials


def _require_sampler(settings: SearchSettings, space: Space, metric_count: int) -> None:
    sampler = settings.sampler
    for package in {"cmaes": ("cmaes", "scipy"), "qmc": ("scipy",)}.get(sampler, ()):
        try:
            __import__(package)
        except ImportError:
            raise ConfigError(
                f"hydra.sweeper.sampler={sampler} needs the package {package}: pip install 'mlx-runner[samplers]'"
            ) from None
    if sampler == "cmaes":
        if metric_count > 1:
            raise ConfigError("hydra.sweeper.sampler=cmaes minimizes one metric: take tpe for several.")
        if sum(isinstance(dimension, Interval) for dimension in space.dimensions.values()) < 2:
            raise ConfigError(
                "hydra.sweeper.sampler=cmaes needs two settings or more that vary over an interval or a range; "
                "choices have no order that it could follow. Take tpe."
            )


def _distribution(dimension: Choices | Interval) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.choices)
    if dimension.is_int:
        step = 1 if dimension.log else int(dimension.step or 1)
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log, step=step)
    step_size = None if dimension.log else dimension.step
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=step_size)


def _grid_order(settings: SearchSettings, space: Space) -> list[dict[str, Value]]:
    """Return all combinations; in a random order where the trials are too few for all of them."""
    combinations = space.combinations()
    if settings.trials is None or settings.trials >= len(combinations):
        return combinations
    return sorted(
        combinations, key=lambda params: hashlib.blake2b(f"{settings.seed}/{params}".encode(), digest_size=8).digest()
    )
