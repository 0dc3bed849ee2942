"""Starting and resuming a search: its options, its space, its first job, and what a resume may change."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from runner.common.clock import utc_now
from runner.common.errors import ConfigError
from runner.common.safe_json import is_count
from runner.common.text import count, relative_path
from runner.config import schema, serialize
from runner.config.invocation import Invocation
from runner.config.labels import NO_LABELS
from runner.config.search_settings import DEFAULT_TRIALS, MAY_GROW, SAMPLERS, SearchSettings, make_settings
from runner.runs import search_record, sweep_manifest
from runner.runs.labels import write_labels
from runner.runs.objective import VALID_LOSS, Objective
from runner.runs.search_record import SearchRecord, SearchRecordWriter
from runner.runs.sweep_manifest import SweepJob, SweepManifest
from runner.sweeps import grid
from runner.sweeps.extension import extend
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.job_planner import JobPlanner
from runner.sweeps.labels import relabel, take_labels
from runner.sweeps.params import param_overrides
from runner.sweeps.search.decide import SearchState, Targets
from runner.sweeps.search.earlier import EarlierResult, find_earlier
from runner.sweeps.search.jobs import TrialJobs
from runner.sweeps.search.rungs import plan_rungs
from runner.sweeps.search.search import Search
from runner.sweeps.search.space import Space, make_space
from runner.sweeps.search.study import Study
from runner.sweeps.sweep import SweepFailed, launcher_record, report

_DECISIVE = ("train.iters", "train.epochs", "train.eval_", "train.early_stopping", "objective.", "data.", "model.")
"""Settings that are free on resume of a run, but would make the trials of a search incomparable."""
_LENGTH = ("iters", "epochs", "eval_every", "eval_at")
"""Settings of train that have to be equal in all trials."""


@dataclass(frozen=True)
class _Plan:
    """What a search runs with, new or resumed."""

    settings: SearchSettings
    space: Space
    template: SweepJob
    """A job with values of the space, from which those of the trials derive."""
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
        default = self.space.size if self.settings.sampler == "grid" else DEFAULT_TRIALS
        return int(min(self.space.size, self.settings.trials or default))


def run_search(
    arguments: Sequence[str],
    *,
    options: Mapping[str, Any],
    launcher: Launcher,
    context: HydraContext,
    composed: DictConfig,
    invocation: Invocation,
) -> None:
    """Run the search of `arguments` (task overrides) in hydra.sweep.dir, whose lock is held, or continue it.

    Args:
        arguments: overrides of a new search; a resumed one has them in its record.
        options: hydra.sweeper.* without _target_.
        launcher: runs the jobs.
        context: of Hydra.
        composed: the composed config of the sweep, with Hydra's node.
        invocation: the command line.

    Raises:
        ConfigError: what is asked for cannot be searched; nothing has started or been recorded then.
        SweepFailed: at the end, if a trial failed or diverged.
    """
    if invocation.stop_at is not None:
        raise ConfigError("train.stop_at= stops every job there, and in a search the rungs decide: leave it out.")
    folder = Path(composed.hydra.sweep.dir)
    settings = make_settings({name: value for name, value in options.items() if name != "params"})
    manifest = sweep_manifest.read_manifest(folder)
    composer = JobComposer(context.config_loader, composed)
    planner = JobPlanner(composer, manifest, composed, None)
    record, changes = SearchRecord(), dict[str, Any]()
    if manifest.jobs:
        record = search_record.read_search(folder) or record
        _require_head(record, folder)
        changes = _change_jobs(manifest, composer, planner, composed, invocation)
        stored = [text for text in arguments if text.startswith("stored=")]  # of a repeated run
        plan = _recorded_plan(manifest, record, settings, composer, stored)
    else:
        (folder / search_record.NAME).unlink(missing_ok=True)  # left by a start that recorded no job
        texts = [*param_overrides(dict(options.get("params") or {}), composer), *arguments]
        plan = _new_plan(texts, settings, composer, planner)
    study = _study(folder, plan)
    for result in plan.earlier:
        study.add_earlier(result)
    if not manifest.jobs:
        if plan.template.labels != NO_LABELS:
            write_labels(folder, plan.template.labels)
        OmegaConf.save(composed, folder / "multirun.yaml")  # as Hydra's own sweeper does
        manifest.record(arguments=grid.stored_arguments(invocation), launcher=launcher_record(composed))
    with closing(SearchRecordWriter(folder, record)) as writer:
        if not record.settings:
            writer.append(_head(plan))
        _record_extension(record, writer, settings)
        print(_plan_text(folder, plan), flush=True)
        jobs = TrialJobs(manifest, planner, plan.space, launcher, composed.hydra.output_subdir, plan.template)
        search = Search(
            _state(plan, launcher),
            _targets(plan),
            study=study,
            jobs=jobs,
            objective=plan.objective,
            record=record,
            writer=writer,
        )
        results = None
        try:
            if changes:
                jobs.apply_changes()
            search.run()
        finally:
            if manifest.jobs:
                results = report(manifest, {})
    if results is not None and results.failed:
        raise SweepFailed(
            f"{results.failed} of {len(results.jobs)} jobs failed or diverged; the table and results.csv say why. The "
            "search counts them as such and does not try them again."
        )


def _new_plan(texts: Sequence[str], settings: SearchSettings, composer: JobComposer, planner: JobPlanner) -> _Plan:
    """Return the plan of a new search, after every value of its space was composed and validated."""
    space = make_space([composer.parse(text) for text in texts], composer.is_group)
    extremes = [space.overrides(params) for params in space.extremes()]
    template = planner.draft([*space.fixed, *extremes[0]])
    with_references = replace(template, config=serialize.change_dict(template.config or {}, template.references))

    def config_of(typed: Sequence[str]) -> Mapping[str, Any]:
        if space.has_groups:
            return planner.draft([*space.fixed, *typed]).config or {}
        return planner.changed_config(with_references, typed)

    configs = [template.config or {}, *map(config_of, extremes[1:])]
    _require_seeds(space, settings, template)
    lengths = {tuple(str(config["train"][name]) for name in _LENGTH) for config in configs}
    train = configs[0]["train"]
    if train["epochs"] is not None:
        raise ConfigError("A search needs the length of its trials in updates: type train.iters=, not train.epochs=.")
    if len(lengths) > 1:
        raise ConfigError(f"The trials of a search have one length: do not vary train.{', '.join(_LENGTH)}.")
    objective = Objective.of(serialize.flatten_stored(template.config or {}))
    if len(objective.each) > 1 and settings.pruner != "none":
        raise ConfigError(
            f"hydra.sweeper.pruner={settings.pruner} compares trials by their validation loss, which says nothing of "
            f"{', '.join(objective.metrics)} together: type hydra.sweeper.pruner=none."
        )
    rungs = [train["iters"]]
    if settings.pruner != "none":
        trials = int(min(settings.trials or DEFAULT_TRIALS, space.size))
        rungs = plan_rungs(train["iters"], eta=settings.eta, min_iters=settings.min_iters, trials=trials)
        space = space.with_fixed(f"train.eval_at=[{','.join(map(str, sorted({*rungs, *train['eval_at']})))}]")
        template = planner.draft([*space.fixed, *extremes[0]])
    sampler = "grid" if space.size <= (settings.trials or DEFAULT_TRIALS) else settings.sampler
    earlier = []
    if settings.warm_from is not None:
        found = find_earlier(
            Path(settings.warm_from), space, lambda params: config_of(space.overrides(params)), objective, rungs[-1]
        )
        print("\n".join(found.lines()))
        earlier = found.results
    return _Plan(settings, space, template, rungs, objective, sampler, settings.trials, earlier)


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


def _require_head(record: SearchRecord, folder: Path) -> None:
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
        f"{folder / search_record.NAME}: its first line, which says what is searched, is missing or damaged. The "
        "jobs are whole: each can be resumed by itself."
    )


def _list(head: Mapping[str, Any], name: str) -> list[Any]:
    found = head.get(name)
    return found if isinstance(found, list) else []


def _recorded_plan(
    manifest: SweepManifest,
    record: SearchRecord,
    settings: SearchSettings,
    composer: JobComposer,
    stored: Sequence[str],
) -> _Plan:
    """Return the plan of a search that is resumed, with the options that were typed now."""
    recorded = record.settings
    for name in [field.name for field in dataclasses.fields(SearchSettings) if field.name not in MAY_GROW]:
        if getattr(settings, name) != recorded["options"].get(name):
            raise ConfigError(
                f"hydra.sweeper.{name} is {recorded['options'].get(name)} in this search and stays so: a resume may "
                f"change {', '.join(MAY_GROW)}. A new search can begin with its results: "
                f"hydra.sweeper.warm_from={relative_path(manifest.folder)}"
            )
    if settings.trials is not None and settings.trials < len(record.trials):
        raise ConfigError(
            f"hydra.sweeper.trials={settings.trials}: this search has {len(record.trials)} trials already; a resume "
            "may raise their number."
        )
    texts = [composer.parse(text) for text in (*stored, *recorded["fixed"], *recorded["space"])]
    space = make_space(texts, composer.is_group)
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
    return _Plan(settings, space, manifest.jobs[0], record.rungs, objective, sampler, grid_trials, earlier)


def _change_jobs(
    manifest: SweepManifest, composer: JobComposer, planner: JobPlanner, composed: DictConfig, invocation: Invocation
) -> dict[str, Any]:
    """Record the settings that were typed for a resume, which apply to all jobs, and return them.

    Raises:
        ConfigError: one of them would change what the trials compute.
    """
    labels, typed = take_labels([composer.parse(text) for text in invocation.sweep_overrides])
    added = extend(manifest, typed, composer, planner)
    decisive = [name for name in added.changes if name.startswith(_DECISIVE)]
    if decisive:
        raise ConfigError(
            f"{decisive[0]}: the trials of a search have to stay comparable, so a resume does not change it. A new "
            f"search can begin with its results: hydra.sweeper.warm_from={relative_path(manifest.folder)}"
        )
    if added.jobs or any(override.is_sweep_override() for override in typed):
        names = ", ".join(override.key_or_group for override in typed)
        raise ConfigError(
            f"{names}: the space of a search is fixed, since its suggestions depend on it. A new search can begin with "
            f"its results: hydra.sweeper.warm_from={relative_path(manifest.folder)}"
        )
    relabel(manifest.folder, labels)  # nothing refuses the resume after this
    manifest.record(
        arguments=grid.merge_arguments(manifest.arguments, grid.stored_arguments(invocation)),
        launcher=launcher_record(composed),
        changes=added.changes,
    )
    for name, value in added.changes.items():
        print(f"changed for all jobs: {name}={value}")
    return added.changes


def _study(folder: Path, plan: _Plan) -> Study:
    settings = replace(plan.settings, sampler=plan.sampler, trials=plan.grid_trials)
    return Study(folder, settings, plan.space, [single.maximize for single in plan.objective.each])


def _state(plan: _Plan, launcher: Launcher) -> SearchState:
    at_once = getattr(launcher, "at_once", None)
    return SearchState(
        pruner=plan.settings.pruner,
        eta=plan.settings.eta,
        rungs=plan.rungs,
        maximize=plan.objective.maximize,
        learns=plan.sampler in ("tpe", "cmaes"),
        at_once=at_once() if callable(at_once) else 1,
        seed=int((plan.template.config or {})["seed"]),
    )


def _targets(plan: _Plan) -> Targets:
    settings = plan.settings
    return Targets(plan.trials, settings.budget_seconds, settings.seeds, settings.finalists)


def _head(plan: _Plan) -> dict[str, Any]:
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


def _record_extension(record: SearchRecord, writer: SearchRecordWriter, settings: SearchSettings) -> None:
    """Record the options that were typed for this resume, and apply from here on."""
    present = dict(record.settings["options"])
    for line in record.extensions:
        present.update(line["extended"])
    changed = {name: value for name in MAY_GROW if (value := getattr(settings, name)) != present[name]}
    if changed:
        writer.append({"extended": changed, "wave": len(record.waves)})


def _plan_text(folder: Path, plan: _Plan) -> str:
    """Return what is searched: ``search  outputs/sweeps/x: 30 trials by tpe over 2 settings, rungs 25, 75, 200``."""
    settings, names = plan.settings, ", ".join(plan.space.dimensions)
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
