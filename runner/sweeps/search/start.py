"""Starting and resuming a search, and what a resume may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from runner.common.errors import ConfigError
from runner.common.text import relative_path
from runner.config.invocation import Invocation
from runner.config.labels import NO_LABELS
from runner.config.search_settings import CHANGEABLE_ON_RESUME, SearchSettings, make_settings
from runner.runs import search_record, sweep_manifest
from runner.runs.labels import write_labels
from runner.runs.search_record import SearchRecord, SearchRecordWriter
from runner.runs.sweep_manifest import SweepManifest
from runner.sweeps import grid
from runner.sweeps.extension import extend
from runner.sweeps.job_composer import JobComposer
from runner.sweeps.job_planner import JobPlanner
from runner.sweeps.labels import relabel, take_labels
from runner.sweeps.params import param_overrides
from runner.sweeps.search.jobs import TrialJobs
from runner.sweeps.search.search import Search
from runner.sweeps.search.search_plan import SearchPlan, head_line, new_plan, plan_text, recorded_plan, require_head
from runner.sweeps.search.state import SearchState, Targets
from runner.sweeps.search.study import Study
from runner.sweeps.sweep import SweepFailed, launcher_record, report
from runner.training.signals import StopSignals

_DECISIVE = (
    "adapter",
    "data.",
    "model.",
    "objective.",
    "train.early_stopping",
    "train.epochs",
    "train.eval_",
    "train.iters",
    "train.nonfinite_limit",
    "train.on_nonfinite",
)
"""Settings that are free on resume of a run, but would make the trials of a search incomparable."""


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
        require_head(record, folder)
        changes = _change_jobs(manifest, composer, planner, composed, invocation)
        stored = [text for text in arguments if text.startswith("stored=")]  # of a repeated run
        plan = recorded_plan(manifest, record, settings, composer, stored)
    else:
        texts = [*param_overrides(dict(options.get("params") or {}), composer), *arguments]
        plan = new_plan(texts, settings, composer, planner)
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
            writer.append(head_line(plan))
        _record_extension(record, writer, settings)
        print(plan_text(folder, plan), flush=True)
        jobs = TrialJobs(manifest, planner, plan.space, launcher, composed.hydra.output_subdir, plan.template)
        signals = StopSignals()
        search = Search(
            _state(plan, launcher),
            _targets(plan),
            study=study,
            jobs=jobs,
            objective=plan.objective,
            record=record,
            writer=writer,
            signals=signals,
        )
        results = None
        # A launcher of another package may need the signals itself.
        is_ours = callable(getattr(launcher, "run_jobs", None))
        try:
            with signals if is_ours else nullcontext():
                if changes:
                    jobs.apply_changes()
                search.run()
        finally:
            if manifest.jobs:
                results = report(manifest, jobs.errors)
    if results is not None and results.failed:
        raise SweepFailed(
            f"{results.failed} of {len(results.jobs)} jobs failed or diverged; the table and results.csv say why. The "
            "search counts such trials and does not try them again; resume= tries again the seeds that failed."
        )


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


def _study(folder: Path, plan: SearchPlan) -> Study:
    settings = replace(plan.settings, sampler=plan.sampler, trials=plan.grid_trials)
    return Study(folder, settings, plan.space, [single.maximize for single in plan.objective.each])


def _state(plan: SearchPlan, launcher: Launcher) -> SearchState:
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


def _targets(plan: SearchPlan) -> Targets:
    settings = plan.settings
    return Targets(plan.trials, settings.budget_seconds, settings.seeds, settings.finalists)


def _record_extension(record: SearchRecord, writer: SearchRecordWriter, settings: SearchSettings) -> None:
    """Record the options that were typed for this resume, and apply from here on."""
    present = dict(record.settings["options"])
    for line in record.extensions:
        present.update(line["extended"])
    changed = {name: value for name in CHANGEABLE_ON_RESUME if (value := getattr(settings, name)) != present[name]}
    if changed:
        writer.append({"extended": changed, "wave": len(record.waves)})
