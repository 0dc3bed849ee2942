"""What a search runs with, new or resumed: its options, its space, its rungs and its objective."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.common.clock import utc_now
from runner.common.errors import ConfigError
from runner.common.safe_json import is_count
from runner.common.text import count, relative_path
from runner.config import schema, serialize
from runner.config.search_settings import CHANGEABLE_ON_RESUME, DEFAULT_TRIALS, MAX_TRIALS, SAMPLERS, SearchSettings
from runner.runs import search_record
from runner.runs.objective import VALID_LOSS, Objective
from runner.runs.search_record import SearchRecord
from runner.runs.sweep_manifest import SweepJob, SweepManifest
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.job_planner import JobPlanner, references_of
from runner.sweeps.search.earlier import EarlierResult, find_earlier
from runner.sweeps.search.rungs import plan_rungs
from runner.sweeps.search.space import Space, make_space

_LENGTH = ("iters", "epochs", "eval_every", "eval_at")
"""Settings of train that have to be equal in all trials."""


@dataclass(frozen=True)
class SearchPlan:
    """What a search runs with, new or resumed."""

    settings: SearchSettings
    space: Space
    template: SweepJob
    """A job with the first value of each dimension, from which those of the trials derive."""
    rungs: list[int]
    objective: Objective
    sampler: str
    """That of the settings, or grid where there are enough trials for all combinations."""
    grid_trials: int | None
    """The trials that the search began with: a grid with fewer than its combinations has a random order."""
    earlier: list[EarlierResult]
    """Results of an earlier sweep that the sampler knows from the start."""

    @property
    def trials(self) -> int:
        """How many trials there are, at most."""
        return _most_trials(self.settings, self.space)


def _most_trials(settings: SearchSettings, space: Space) -> int:
    """Return how many trials there are, at most."""
    default = space.size if settings.sampler == "grid" else DEFAULT_TRIALS
    return int(min(settings.trials or default, space.size, MAX_TRIALS))


def new_plan(texts: Sequence[str], settings: SearchSettings, composer: JobComposer, planner: JobPlanner) -> SearchPlan:
    """Return the plan of a new search, after every value of its space was composed and validated."""
    overrides = [composer.parse(text) for text in texts]

    def references() -> Mapping[str, Any]:
        shared = [override.input_line or "" for override in overrides if not override.is_sweep_override()]
        return references_of(composer.compose(shared).config)

    space = make_space(overrides, composer.is_group, references)
    extremes = [space.overrides(params) for params in space.extremes()]
    template = planner.draft([*space.fixed, *extremes[0]])
    with_references = replace(template, config=serialize.change_dict(template.config or {}, template.references))

    def config_of(typed: Sequence[str]) -> Mapping[str, Any]:
        if space.has_groups:
            return planner.draft([*space.fixed, *typed]).config or {}
        return planner.changed_config(with_references, typed)

    iters = _common_length([template.config or {}, *map(config_of, extremes[1:])])
    _require_seeds(space, settings, template)
    objective = _objective(template, settings)
    sampler = _sampler(space, settings)
    rungs = [iters]
    if settings.pruner != "none":
        most = max(_most_trials(settings, space), settings.eta)  # of a single trial too: a resume may add others
        trials = int(min(most, space.size))
        rungs = plan_rungs(iters, eta=settings.eta, min_iters=settings.min_iters, trials=trials)
        typed = (template.config or {})["train"]["eval_at"]
        space = space.with_fixed(f"train.eval_at=[{','.join(map(str, sorted({*rungs, *typed})))}]")
        template = planner.draft([*space.fixed, *extremes[0]])
    earlier = []
    if settings.warm_from is not None:
        found = find_earlier(
            Path(settings.warm_from), space, lambda params: config_of(space.overrides(params)), objective, rungs[-1]
        )
        print("\n".join(found.lines()))
        earlier = found.results
    return SearchPlan(settings, space, template, rungs, objective, sampler, settings.trials, earlier)


def _common_length(configs: Sequence[Mapping[str, Any]]) -> int:
    """Return the updates of a trial; refuse configs whose lengths differ, or depend on the data."""
    if configs[0]["train"]["epochs"] is not None:
        raise ConfigError("A search needs the length of its trials in updates: type train.iters=, not train.epochs=.")
    if len({tuple(str(config["train"][name]) for name in _LENGTH) for config in configs}) > 1:
        raise ConfigError(f"The trials of a search have one length: do not vary train.{', '.join(_LENGTH)}.")
    return int(configs[0]["train"]["iters"])


def _objective(template: SweepJob, settings: SearchSettings) -> Objective:
    """Return the objective of the trials; refuse several metrics where a pruner compares trials by one."""
    objective = Objective.of(serialize.flatten_stored(template.config or {}))
    if len(objective.each) > 1 and settings.pruner != "none":
        raise ConfigError(
            f"hydra.sweeper.pruner={settings.pruner} compares trials by their validation loss, which says nothing of "
            f"{', '.join(objective.metrics)} together: type hydra.sweeper.pruner=none."
        )
    return objective


def _sampler(space: Space, settings: SearchSettings) -> str:
    """Return the sampler, grid where there are enough trials for all combinations; refuse one that would not learn."""
    sampler = "grid" if space.size <= (settings.trials or DEFAULT_TRIALS) else settings.sampler
    if sampler == "cmaes" and settings.pruner != "none":
        raise ConfigError(
            "hydra.sweeper.sampler=cmaes learns from trials at their end alone, and "
            f"hydra.sweeper.pruner={settings.pruner} stops most of them before: type hydra.sweeper.pruner=none, or "
            "take tpe."
        )
    return sampler


def _require_seeds(space: Space, settings: SearchSettings, template: SweepJob) -> None:
    """Refuse other seeds for the finalists where the seed is searched, or has no successors."""
    if settings.seeds == 1:
        return
    if "seed" in space.dimensions:
        raise ConfigError("hydra.sweeper.seeds trains the finalists with other seeds: leave seed= out of the search.")
    seed = (template.config or {})["seed"]
    most = schema.metadata()["seed"].at_most
    if most is not None and seed + settings.seeds - 1 > most:
        raise ConfigError(f"seed={seed} leaves no room for hydra.sweeper.seeds={settings.seeds}: take a smaller one.")


def require_head(record: SearchRecord, folder: Path) -> None:
    """Refuse a record whose first line is lost or damaged."""
    head = record.settings
    texts = [*_list(head, "space"), *_list(head, "fixed")]
    fits = (
        head.get("sampler") in SAMPLERS
        and isinstance(head.get("options"), dict)
        and {field.name for field in dataclasses.fields(SearchSettings)} <= head["options"].keys()
        and bool(_list(head, "space"))
        and all(isinstance(text, str) for text in texts)
        and bool(record.rungs)
        and all(is_count(step) and step > 0 for step in record.rungs)
        and bool(record.metrics)
        and all(metric in schema.OBJECTIVE_METRICS for metric in record.metrics)
        and [type(value) for value in _list(head, "maximize")] == [bool] * len(record.metrics)
        and isinstance(head.get("earlier"), list)
    )
    if not fits:
        raise _damaged_head(folder)


def _damaged_head(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder / search_record.NAME}: its first line, which says what is searched, is missing or damaged. "
        f"{search_record.without_record(folder)}"
    )


def _list(head: Mapping[str, Any], name: str) -> list[Any]:
    found = head.get(name)
    return found if isinstance(found, list) else []


def recorded_plan(
    manifest: SweepManifest,
    record: SearchRecord,
    settings: SearchSettings,
    composer: JobComposer,
    stored: Sequence[str],
) -> SearchPlan:
    """Return the plan of a search that is resumed, with the options that were typed now."""
    recorded = record.settings
    for name in [field.name for field in dataclasses.fields(SearchSettings) if field.name not in CHANGEABLE_ON_RESUME]:
        if getattr(settings, name) != recorded["options"].get(name):
            raise ConfigError(
                f"hydra.sweeper.{name} is {recorded['options'].get(name)} in this search and stays so: a resume may "
                f"change {', '.join(CHANGEABLE_ON_RESUME)}. A new search can begin with its results: "
                f"hydra.sweeper.warm_from={relative_path(manifest.folder)}"
            )
    jobs = [trial.job for trial in record.trials]
    made = len({*jobs} - {None}) + jobs.count(None)  # trials of equal settings count once
    if settings.trials is not None and settings.trials < made:
        raise ConfigError(
            f"hydra.sweeper.trials={settings.trials}: this search has {count(made, 'trial')} already; a resume may "
            "raise their number."
        )
    texts = [composer.parse(text) for text in (*stored, *recorded["fixed"], *recorded["space"])]
    space = make_space(texts, composer.is_group, lambda: manifest.jobs[0].references)
    _require_seeds(space, settings, manifest.jobs[0])
    singles = [Objective(name, higher) for name, higher in zip(record.metrics, recorded["maximize"], strict=True)]
    objective = replace(singles[0], others=tuple(singles[1:]))
    sampler, grid_trials = recorded["sampler"], recorded["options"]["trials"]
    try:
        earlier = [EarlierResult.of(line) for line in recorded["earlier"]]
        fits = all(space.contains(result.params) for result in earlier)
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise _damaged_head(manifest.folder)
    return SearchPlan(settings, space, manifest.jobs[0], record.rungs, objective, sampler, grid_trials, earlier)


def head_line(plan: SearchPlan) -> dict[str, Any]:
    """Return the first line of the record."""
    objective, settings = plan.objective, plan.settings
    return {
        "schema": search_record.SCHEMA,
        "time": utc_now(),
        "optuna": importlib.metadata.version("optuna"),
        "sampler": plan.sampler,
        "pruner": settings.pruner,
        "eta": settings.eta,
        "rungs": plan.rungs,
        "metrics": list(objective.metrics),
        "maximize": [single.maximize for single in objective.each],
        "judged_by": VALID_LOSS,
        "seed": settings.seed,
        "seeds": settings.seeds,
        "trials": plan.trials,
        "budget_seconds": settings.budget_seconds,
        "options": dataclasses.asdict(settings),
        "groups": plan.space.has_groups,
        "space": [f"{key}={text}" for key, text in plan.space.texts.items()],
        "fixed": [text for text in plan.space.fixed if not text.startswith(("stored=", "hydra"))],
        "earlier": [result.to_dict() for result in plan.earlier],
    }


def plan_text(folder: Path, plan: SearchPlan) -> str:
    """Return what is searched: ``search  outputs/sweeps/x: 30 trials by tpe over 2 settings, rungs 25, 75, 200``."""
    settings, names = plan.settings, ", ".join(key.lstrip("+") for key in plan.space.dimensions)
    parts = [f"{count(plan.trials, 'trial')} by {plan.sampler} over {names}"]
    if settings.pruner != "none":
        parts.append(f"rungs {', '.join(map(str, plan.rungs))}, of which the best 1/{settings.eta} continue")
    if settings.budget is not None:
        parts.append(f"a budget of {settings.budget}")
    if settings.seeds > 1:
        parts.append(f"{settings.seeds} seeds for {settings.finalists} finalists")
    if plan.earlier:
        parts.append(f"{count(len(plan.earlier), 'result')} of {settings.warm_from}")
    return f"search {relative_path(folder)}: {'; '.join(parts)}"
