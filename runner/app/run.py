"""A plain run: check the composed config, claim its directory, then train in it as a job of Hydra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from omegaconf import DictConfig, OmegaConf

from runner.app.compose import HydraSession, set_hydra, without_hydra
from runner.app.hydra_internals import job_error
from runner.app.resolve import config_to_store, require_adapter, resolve_config
from runner.checkpoints import mirror
from runner.common.errors import ConfigError, DirectoryInUse, RunnerError
from runner.common.text import shell_path
from runner.config import validation
from runner.config.invocation import Invocation
from runner.config.schema import Config
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import ResumeSource, RunSpec, new_run_id


def start_run(invocation: Invocation, session: HydraSession, config: DictConfig) -> None:
    """Start or resume the run of the composed `config`, and train it to its end.

    Whatever the config alone is refused for is refused before a directory is claimed.

    Raises:
        RunnerError: the run was refused or failed.
        SystemExit: a signal stopped the run; it can be resumed.
    """
    checkpoints = check(invocation, config).checkpoint.dir
    context = session.context(config)
    directory, source = _open_directory(invocation, session.source, config, checkpoints)

    def train(job_config: DictConfig) -> float | None:
        from runner.backends import blas

        blas.load_blas()  # before MLX is imported
        from runner.training.run import train_run

        settings = resolve_config(job_config)
        settings.experiment = settings.experiment or HydraConfig.get().runtime.choices.get("experiment")
        stored = config_to_store(job_config, settings)
        return train_run(RunSpec(settings, stored, directory, source, new_run_id(), stop_at=invocation.stop_at))

    with _removed_unless_begun(directory, config.hydra.output_subdir):
        context.callbacks.on_run_start(config=config, config_name=session.config_name)
        job = run_job(train, config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
        context.callbacks.on_run_end(config=config, config_name=session.config_name, job_return=job)
        if error := job_error(job):
            raise error


def check(invocation: Invocation, config: DictConfig) -> Config:
    """Return the settings of the composed `config` if a run can start with them.

    Raises:
        ConfigError: a setting is invalid or looks like a secret.
    """
    validation.refuse_secrets(OmegaConf.to_container(config.hydra, resolve=False), "hydra")
    # For ${hydra:…}. The claim may still choose another directory, so the job resolves the config again.
    set_hydra(config, "runtime.output_dir", str(Path(config.hydra.run.dir).absolute()))
    HydraConfig.instance().set_config(config)
    settings = resolve_config(without_hydra(config))
    validation.validate_stop_at(invocation.stop_at, settings)
    if (
        invocation.resume is None or "adapter" in invocation.settings
    ):  # a resumed run need not have its adapter any more
        require_adapter(settings)
    return settings


def numbered(path: Path) -> Iterator[Path]:
    """Yield `path`, `path-2`, `path-3`, …"""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


def _open_directory(
    invocation: Invocation, source: ResumeSource | None, config: DictConfig, checkpoints: str
) -> tuple[RunDirectory, ResumeSource | None]:
    """Claim the directory of a new run, or lock that of the run to continue, and set hydra.run.dir to it.

    Returns:
        the directory, and where the run resumes from.
    """
    resume, is_named = invocation.resume, "hydra.run.dir" in invocation.hydra_settings
    from_backup = resume is not None and mirror.is_backup(resume)
    if from_backup:
        source = None
    if source is not None and not source.branch:
        if is_named:
            raise ConfigError(
                f"resume={shell_path(source.run)} continues in that directory: "
                "hydra.run.dir is for a branch or a new run."
            )
        directory = RunDirectory(source.run, checkpoints)
        directory.lock()
        set_hydra(config, "output_subdir", None)  # .hydra/ stays that of the first start
    else:
        directory = _claim(Path(config.hydra.run.dir).absolute(), checkpoints, is_named)
        if from_backup:
            assert resume is not None
            source = _restore(resume, directory)
    set_hydra(config, "run.dir", str(directory.path))
    return directory, source


def _claim(path: Path, checkpoints: str, is_named: bool) -> RunDirectory:
    """Claim `path`, or, where the path was made from the time and is taken, the first free `path-2`, `path-3`, …"""
    for candidate in numbered(path):
        directory = RunDirectory(candidate, checkpoints)
        try:
            directory.claim()
            return directory
        except (ConfigError, DirectoryInUse):
            if is_named or not candidate.is_dir():
                raise
    raise AssertionError("numbered() is endless")


def _restore(backup: Path, directory: RunDirectory) -> ResumeSource:
    """Fill the claimed `directory` from the `backup` that `resume=` names, and continue the run there."""
    try:
        damaged = mirror.restore(backup, directory)
    except RunnerError:
        directory.abandon()
        raise
    print(f"restored {backup} into {directory.path}", *damaged, sep="\n")
    return ResumeSource(run=directory.path)


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
