"""Starting and resuming a sweep: its directory, its recorded arguments, and Hydra's sweeper and launcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from runner.app import guard
from runner.app.compose import HydraSession, set_hydra
from runner.app.run import claim_first_free
from runner.common import layout
from runner.common.errors import ConfigError
from runner.config import validation
from runner.config.invocation import Invocation
from runner.config.quoting import quote_text, unquote
from runner.runs import search_record, sweep_manifest
from runner.runs.directory import RunDirectory, unexpected_names
from runner.runs.search_record import JOURNAL, SearchRecord
from runner.runs.sweep_manifest import SweepManifest
from runner.sweeps import grid
from runner.sweeps.job import JobTask
from runner.sweeps.sweep import OWN_PROCESS_LAUNCHERS, OWN_SWEEPERS, PROCESS_LAUNCHER, refuse_failed, report

_LEFT_BY_A_START = {".lock", "multirun.yaml", sweep_manifest.NAME, layout.LABELS}
_LEFT_BY_A_SEARCH = {search_record.NAME, JOURNAL, f"{JOURNAL}.lock"}
_LEFT_BY_A_START |= _LEFT_BY_A_SEARCH
"""What a start leaves that ended before it recorded a job."""


def resume_sweep(invocation: Invocation) -> Invocation:
    """Return the invocation that resumes the sweep which `resume=` names.

    Hydra composes its own settings again, as recorded and with those typed on top. The settings of the jobs are
    recorded; those typed now are `sweep_overrides`.

    Raises:
        ConfigError: `repeat=` is typed too, or the manifest cannot be read, is empty or holds what is refused.
    """
    assert invocation.resume is not None
    folder = invocation.resume.absolute()
    if invocation.repeat is not None:
        raise ConfigError(f"resume={folder} finishes a sweep with its own settings: leave out repeat=.")
    manifest = sweep_manifest.read_manifest(folder)
    if not manifest.jobs:
        raise ConfigError(f"resume={folder}: no job was recorded before the sweep ended: start it again.")
    guard.check_sweep_manifest(manifest, invocation.settings)
    typed_hydra = [argument for argument in invocation.overrides if _is_hydra(argument)]
    recorded = [argument for argument in manifest.arguments if _is_hydra(argument) and not _is_sweeper(argument)]
    search = search_record.read_search(folder)
    if problem := search_record.lost_record(manifest):
        raise ConfigError(problem)
    if search is not None:
        recorded += _search_arguments(search)
    if "hydra/launcher" in invocation.hydra_settings:
        recorded = [argument for argument in recorded if not _is_launcher(argument)]
    else:
        recorded += _launcher_arguments(manifest, {grid.override_key(argument) for argument in recorded})
    flags = [a for a in manifest.arguments if a.startswith("--config-dir=") and Path(a.partition("=")[2]).is_dir()]
    repeat = [Path(unquote(a.partition("=")[2])) for a in manifest.arguments if a.startswith("repeat=")]
    # Jobs of an earlier version that have not begun are composed from the repeated run.
    needs_repeated = any(job.config is None for job in manifest.jobs)
    # So are the trials of a search that chooses from groups.
    needs_repeated |= search is not None and search.settings.get("groups") is True
    return replace(
        invocation,
        flags=grid.merge_arguments(["-m", *flags], [flag for flag in invocation.flags if flag != "--multirun"]),
        overrides=[*grid.merge_arguments(recorded, typed_hydra), f"hydra.sweep.dir={quote_text(str(folder))}"],
        multirun=True,
        resume=None,
        repeat=repeat[0] if repeat and needs_repeated else None,
        sweep=folder,
        sweep_overrides=[argument for argument in invocation.overrides if not _is_hydra(argument)],
    )


def start_sweep(invocation: Invocation, session: HydraSession, composed: DictConfig) -> None:
    """Run the sweep of the `composed` config with the sweeper and launcher that it names, also third-party ones.

    Raises:
        RunnerError: the sweep was refused, or jobs failed.
        SystemExit: a signal stopped it; it can be resumed.
    """
    _refuse_unsupervised(invocation, composed)
    _refuse_ranks(invocation, composed)
    if invocation.resume is not None:
        raise ConfigError("resume=RUN continues one run: leave out -m. To vary a run: repeat=RUN with -m.")
    validation.refuse_secrets(OmegaConf.to_container(composed, resolve=False))
    if composed.hydra.job.chdir:
        raise ConfigError(
            "hydra.job.chdir=true is not supported in a sweep: its jobs share a process, and their paths are absolute, "
            "so nothing depends on the working directory. Leave it out."
        )
    context = session.context(composed)
    HydraConfig.instance().set_config(composed)  # for ${hydra:…} in the directory
    is_named = "hydra.sweep.dir" in invocation.hydra_settings
    with _claimed(Path(composed.hydra.sweep.dir).absolute(), is_named, invocation.sweep is not None) as folder:
        set_hydra(composed, "sweep.dir", str(folder))
        sweeper = Plugins.instance().instantiate_sweeper(
            hydra_context=context, task_function=JobTask(invocation, folder), config=composed
        )
        context.callbacks.on_multirun_start(config=composed, config_name=session.config_name)
        results = None
        try:
            sweeper.sweep(arguments=_task_overrides(composed))
        finally:
            _close_launcher(sweeper)
            if composed.hydra.sweeper._target_ not in OWN_SWEEPERS and _has_jobs(folder):
                results = report(sweep_manifest.read_manifest(folder), {})
        if results is not None:
            refuse_failed(results)
        context.callbacks.on_multirun_end(config=composed, config_name=session.config_name)


def _close_launcher(sweeper: Sweeper) -> None:
    """Close the launcher of a sweeper, if it is one of ours: those of other packages have no end of their own."""
    close = getattr(getattr(sweeper, "launcher", None), "close", None)
    if callable(close):
        close()


def _refuse_unsupervised(invocation: Invocation, composed: DictConfig) -> None:
    """Refuse supervise= where no process could start a job again: jobs of other launchers share one process."""
    if invocation.supervise is None:
        return
    if invocation.report_run is not None:
        raise ConfigError("supervise=true: this is a sweep, set up by a recipe. Type -m as well.")
    if composed.hydra.launcher._target_ != PROCESS_LAUNCHER:
        raise ConfigError(
            "supervise=true in a sweep needs a process for each job: type hydra/launcher=process too "
            "(with hydra.launcher.jobs=1 one job at a time)."
        )


def _refuse_ranks(invocation: Invocation, composed: DictConfig) -> None:
    """Refuse ranks= where jobs share a process, which MLX connects with others only once."""
    if (invocation.ranks or 1) > 1 and composed.hydra.launcher._target_ not in OWN_PROCESS_LAUNCHERS:
        raise ConfigError(
            f"ranks={invocation.ranks} in a sweep needs a process for each job: type hydra/launcher=process too "
            "(with hydra.launcher.jobs=1 one job at a time), or ray or submitit."
        )


@contextmanager
def _claimed(path: Path, is_named: bool, resumes: bool) -> Iterator[Path]:
    """Hold the lock of a sweep's directory: that of the sweep to resume, or one claimed for a new sweep.

    A directory made from the time gets -2, -3, … where it is taken. One in which nothing was recorded is removed at the
    end. Whoever does not get the lock changes nothing in the directory.
    """
    directory = RunDirectory(path)
    if resumes:
        directory.lock()
    else:
        directory = claim_first_free(path, is_named, _claim)
    try:
        yield directory.path
    finally:
        if not resumes and not _has_jobs(directory.path):
            with suppress(OSError):
                for name in _LEFT_BY_A_START:  # under the lock, so that nobody else has begun to use them
                    (directory.path / name).unlink(missing_ok=True)
                directory.path.rmdir()
        directory.unlock()


def _claim(path: Path) -> RunDirectory:
    directory = RunDirectory(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _require_unused(path)  # before the lock, which is a file in it
        directory.lock()
        try:
            _require_unused(path)
            for name in _LEFT_BY_A_SEARCH:  # or else a resume would take a grid for it
                (path / name).unlink(missing_ok=True)
        except ConfigError:
            directory.unlock()
            raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be created: {error.strerror}.") from None
    return directory


def _require_unused(path: Path) -> None:
    """Refuse a directory with anything in it but the remains of a start that ended before it recorded a job."""
    if path.is_symlink() or unexpected_names(path, _LEFT_BY_A_START) or _has_jobs(path):
        hint = f" To finish the sweep in it: resume={path}" if sweep_manifest.has_sweep_manifest(path) else ""
        raise ConfigError(f"{path} exists already: choose another hydra.sweep.dir.{hint}")


def _has_jobs(path: Path) -> bool:
    try:
        return bool(sweep_manifest.read_manifest(path).jobs)
    except ConfigError:
        return True  # it cannot be understood, so it is not ours to remove


def _task_overrides(composed: DictConfig) -> Sequence[str]:
    overrides = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def _launcher_arguments(manifest: SweepManifest, recorded: set[str]) -> list[str]:
    """Return the arguments that choose the recorded launcher, which a recipe may have chosen."""
    arguments = []
    if manifest.launcher and "hydra/launcher" not in recorded:
        arguments.append(f"hydra/launcher={manifest.launcher['name']}")
    if manifest.launcher.get("jobs") is not None and "hydra.launcher.jobs" not in recorded:
        arguments.append(f"hydra.launcher.jobs={manifest.launcher['jobs']}")
    return arguments


def _search_arguments(search: SearchRecord) -> list[str]:
    """Return the arguments that choose the recorded search and its options, which a recipe may have chosen."""
    recorded = search.settings.get("options")
    options = dict(recorded) if isinstance(recorded, dict) else {}  # a damaged record is refused by the search itself
    for line in search.extensions:
        options.update(line["extended"])
    texts = {name: quote_text(value) if isinstance(value, str) else value for name, value in options.items()}
    chosen = [f"hydra.sweeper.{name}={'null' if text is None else text}" for name, text in texts.items()]
    return ["hydra/sweeper=search", *chosen]


def _is_hydra(argument: str) -> bool:
    return argument.lstrip("+~").startswith(("hydra.", "hydra/"))


def _is_sweeper(argument: str) -> bool:
    """Return whether it chooses or configures the sweeper: its jobs are recorded, and ours finishes them."""
    return grid.override_key(argument).startswith(("hydra/sweeper", "hydra.sweeper."))


def _is_launcher(argument: str) -> bool:
    return grid.override_key(argument).startswith(("hydra/launcher", "hydra.launcher."))
