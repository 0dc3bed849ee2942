"""A plain run: check the composed config, claim its directory, then train in it as a job of Hydra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from omegaconf import DictConfig, OmegaConf

from runner.app.compose import HydraSession, set_hydra, without_hydra
from runner.app.hydra_internals import job_error
from runner.app.job_changes import find_job, job_changes_recorded
from runner.app.resolve import config_to_store, resolve_config, resolve_to_start
from runner.checkpoints import mirror
from runner.common.commands import resume_command
from runner.common.errors import ConfigError, DirectoryInUse, RunnerError
from runner.common.text import shell_path
from runner.config import validation
from runner.config.invocation import Invocation
from runner.config.labels import Labels
from runner.config.schema import Config
from runner.runs.directory import RunDirectory
from runner.runs.find import run_or_best_job
from runner.runs.labels import edit_labels
from runner.runs.run_spec import ResumeSource, RunSpec, new_run_id


def start_run(invocation: Invocation, session: HydraSession, composed: DictConfig) -> None:
    """Start or resume the run of the `composed` config, and train it to its end.

    Whatever the config alone is refused for is refused before a directory is claimed.

    Raises:
        RunnerError: the run was refused or failed.
        SystemExit: a signal stopped the run; it can be resumed.
    """
    config = _config_to_start(invocation, composed)
    if invocation.sweep is None and composed.hydra.runtime.choices.get("hydra/sweeper") == "search":
        print("hydra/sweeper=search has no effect on a single run: add -m for a search", flush=True)
    context = session.context(composed)
    stop_at = invocation.stop_at
    if session.source is not None and not session.source.branch:
        stop_at = _stop_now(RunDirectory(session.source.run, config.checkpoint.dir), stop_at)
    directory, source = _open_directory(invocation, session.source, composed, config.checkpoint.dir)
    set_hydra(composed, "run.dir", str(directory.path))
    if invocation.report_run is not None:
        invocation.report_run(directory.path)

    in_place = source is not None and directory.path == source.run

    def run_in_job(job_config: DictConfig) -> float | None:
        from runner.backends import blas

        launch = invocation.launch
        blas.load_blas(launch.local if launch else invocation.ranks or 1)  # before MLX is imported
        from runner.training.local_ranks import joined_world
        from runner.training.run import train_run

        resolved = resolve_config(job_config)
        resolved.experiment = resolved.experiment or HydraConfig.get().runtime.choices.get("experiment")
        stored = config_to_store(job_config, resolved)
        labels = Labels.take(stored)
        spec = RunSpec(
            resolved,
            stored,
            directory,
            source,
            new_run_id(),
            stop_at=stop_at,
            labels=labels,
            repeats=run_or_best_job(invocation.repeat) if invocation.repeat else None,
            on_accepted=partial(_record_changes, directory.path, stored, labels, invocation) if in_place else None,
            supervise=invocation.supervise,
        )
        with joined_world(invocation) as world:
            return train_run(spec, world=world)

    with _removed_unless_begun(directory, composed.hydra.output_subdir):
        context.callbacks.on_run_start(config=composed, config_name=session.config_name)
        job = run_job(run_in_job, composed, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
        context.callbacks.on_run_end(config=composed, config_name=session.config_name, job_return=job)
        if error := job_error(job):
            raise error


def _config_to_start(invocation: Invocation, composed: DictConfig) -> Config:
    """Return the resolved config of the run, or refuse it if a run cannot start with it."""
    validation.refuse_secrets(OmegaConf.to_container(composed.hydra, resolve=False), "hydra")
    # For ${hydra:…}. The claim may still choose another directory, so the job resolves the config again.
    set_hydra(composed, "runtime.output_dir", str(Path(composed.hydra.run.dir).absolute()))
    HydraConfig.instance().set_config(composed)
    needs_adapter = invocation.resume is None or "adapter" in invocation.settings
    return resolve_to_start(without_hydra(composed), invocation.stop_at, needs_adapter=needs_adapter)


def claim_first_free(path: Path, is_named: bool, claim: Callable[[Path], RunDirectory]) -> RunDirectory:
    """Claim `path`, or, where the path was made from the time and is taken, the first free `path-2`, `path-3`, …

    Args:
        path: the directory to claim.
        is_named: whether the user typed it, so that no other will do.
        claim: claims one directory, and raises ConfigError or DirectoryInUse where it is taken.
    """
    for candidate in chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2))):
        try:
            return claim(candidate)
        except (ConfigError, DirectoryInUse):
            if is_named or not candidate.is_dir():
                raise
    raise AssertionError("the candidates are endless")


def _open_directory(
    invocation: Invocation, source: ResumeSource | None, composed: DictConfig, checkpoint_dir_name: str
) -> tuple[RunDirectory, ResumeSource | None]:
    """Lock the directory of the run to continue, or claim that of a new run, a branch or a run restored from a backup.

    Returns:
        the directory, and where the run resumes from.
    """
    is_named = "hydra.run.dir" in invocation.hydra_settings
    backup = invocation.resume if invocation.resume and mirror.is_backup(invocation.resume) else None
    if source is not None and not source.branch and backup is None:
        if is_named:
            raise ConfigError(
                f"resume={shell_path(source.run)} continues in that directory: "
                "hydra.run.dir is for a branch or a new run."
            )
        directory = RunDirectory(source.run, checkpoint_dir_name)
        directory.lock()
        set_hydra(composed, "output_subdir", None)  # .hydra/ stays that of the first start
        return directory, source

    def claim(path: Path) -> RunDirectory:
        directory = RunDirectory(path, checkpoint_dir_name)
        directory.claim()
        return directory

    directory = claim_first_free(Path(composed.hydra.run.dir).absolute(), is_named, claim)
    return directory, source if backup is None else _restore(backup, directory)


def _stop_now(directory: RunDirectory, typed: int | None) -> int | None:
    """Return the update after which a run that is resumed by itself stops: in a search no later than the search has it.

    Raises:
        ConfigError: the search has compared it there: it alone decides whether the run continues.
    """
    run = directory.path
    job = find_job(run)
    if job is None or job.stop_at is None:
        return typed
    if (directory.read_status().get("step") or 0) < job.stop_at:
        print(f"job {job.number} of a search trains to update {job.stop_at}, where the search compares it", flush=True)
        return min(job.stop_at, typed or job.stop_at)
    commands = [f"To continue the search: {resume_command(run.parent)}"]
    if checkpoints := sorted(directory.checkpoints.glob("step-*[0-9]")):
        commands.append(f"To train this one to its end, in a directory of its own: {resume_command(checkpoints[-1])}")
    raise ConfigError(
        f"resume={shell_path(run)}: this trial of a search stopped at update {job.stop_at}, and the search decides "
        "whether it continues.\n" + "\n".join(commands)
    )


def _restore(backup: Path, directory: RunDirectory) -> ResumeSource:
    """Fill the claimed `directory` from the `backup` that `resume=` names, and continue the run there."""
    try:
        damaged = mirror.restore(backup, directory)
    except RunnerError:
        directory.abandon()
        raise
    print(f"restored {backup} into {directory.path}", *damaged, sep="\n")
    return ResumeSource(run=directory.path)


def _record_changes(run: Path, stored: Mapping[str, Any], labels: Labels, invocation: Invocation) -> None:
    """Record what was typed for a run that resumes in its directory: its labels, and in its sweep its settings.

    Raises:
        DirectoryInUse: the sweep is running; nothing is recorded.
        ConfigError: the present labels cannot be read; nothing is recorded.
    """
    typed = [text.lstrip("+").partition("=")[0] for text in invocation.overrides]
    changes = {name: value for name, value in labels.to_dict().items() if name in typed}
    with job_changes_recorded(run, stored, typed):
        if changes:
            edit_labels(run, lambda present: Labels.of({**present.to_dict(), **changes}))


@contextmanager
def _removed_unless_begun(directory: RunDirectory, output_subdir: str | None) -> Iterator[None]:
    """Remove the claimed directory again if the run ends before it stored its config, as where it was refused."""
    try:
        yield
    finally:
        with suppress(RunnerError):
            directory.lock()  # training unlocks it where it ends, and another process may have claimed it
            if not directory.config.exists():
                _remove_record(directory.path / (output_subdir or ".hydra"))
                directory.abandon()
            directory.unlock()


def _remove_record(folder: Path) -> None:
    """Remove the three files that Hydra's `run_job` writes, and their folder if it is empty then."""
    with suppress(OSError):
        for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
