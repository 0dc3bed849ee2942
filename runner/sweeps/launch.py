"""Starting and finishing a sweep: its directory, its stored overrides, and Hydra's sweeper and launcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from runner.app import guard
from runner.app.compose import HydraSession, set_hydra
from runner.app.run import numbered
from runner.common.errors import ConfigError
from runner.common.text import shell_path
from runner.config import validation
from runner.config.invocation import Invocation
from runner.config.quoting import quote_text, unquote
from runner.runs import sweep_manifest
from runner.sweeps import grid
from runner.sweeps.job import JobTask


def has_sweep_manifest(path: Path) -> bool:
    """Return whether `path` is the directory of a sweep that recorded its jobs."""
    return (path / sweep_manifest.NAME).is_file()


def resume_sweep(invocation: Invocation) -> Invocation:
    """Return the invocation that finishes the sweep which `resume=` names: its stored overrides, the typed ones on top.

    Raises:
        ConfigError: `repeat=` is typed too, or the manifest cannot be read, is empty or holds what is refused.
    """
    assert invocation.resume is not None
    folder = invocation.resume.absolute()
    if invocation.repeat is not None:
        raise ConfigError(f"resume={folder} finishes a sweep with its own settings: leave out repeat=.")
    manifest = sweep_manifest.read_manifest(folder)
    if not manifest.arguments:
        raise ConfigError(f"resume={folder}: {sweep_manifest.NAME} holds no overrides: there is nothing to finish.")
    guard.check_sweep_manifest(manifest, invocation.settings)
    repeat = [Path(unquote(a.partition("=")[2])) for a in manifest.arguments if a.startswith("repeat=")]
    stored = [argument for argument in manifest.arguments if not argument.startswith("repeat=")]
    typed = [argument for argument in invocation.arguments if argument not in ("-m", "--multirun")]
    merged = grid.merge_arguments(stored, typed)
    flags = [argument for argument in merged if argument.startswith("-")]
    overrides = [argument for argument in merged if not argument.startswith("-")]
    return replace(
        invocation,
        flags=["-m", *flags],
        overrides=[*overrides, f"hydra.sweep.dir={quote_text(str(folder))}"],
        multirun=True,
        resume=None,
        repeat=repeat[0] if repeat else None,
        sweep=folder,
    )


def start_sweep(invocation: Invocation, session: HydraSession, composed: DictConfig) -> None:
    """Run the sweep of the `composed` config with the sweeper and launcher that it names, also third-party ones.

    Raises:
        RunnerError: the sweep was refused, or jobs failed.
        SystemExit: a signal stopped it; it can be resumed.
    """
    if invocation.resume is not None:
        run = shell_path(invocation.resume)
        raise ConfigError(f"resume={run} continues one run: leave out -m. To vary a run: repeat={run} with -m.")
    validation.refuse_secrets(OmegaConf.to_container(composed, resolve=False))
    context = session.context(composed)
    sweeper = Plugins.instance().instantiate_sweeper(
        hydra_context=context, task_function=JobTask(invocation), config=composed
    )
    folder = invocation.sweep or _claim(Path(composed.hydra.sweep.dir), "hydra.sweep.dir" in invocation.hydra_settings)
    set_hydra(composed, "sweep.dir", str(folder.absolute()))
    context.callbacks.on_multirun_start(config=composed, config_name=session.config_name)
    sweeper.sweep(arguments=_task_overrides(composed))
    context.callbacks.on_multirun_end(config=composed, config_name=session.config_name)


def _task_overrides(composed: DictConfig) -> Sequence[str]:
    overrides = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def _claim(path: Path, is_named: bool) -> Path:
    """Create `path` for a new sweep, or take over the remains of one that ended before it recorded a job.

    A path that was derived from the time gets -2, -3, … where another sweep started in the same second.
    """
    for candidate in numbered(path):
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if is_named and sweep_manifest.is_abandoned(candidate):
                return candidate
            if is_named:
                hint = f" To finish the sweep in it: resume={candidate}" if has_sweep_manifest(candidate) else ""
                raise ConfigError(f"{candidate} exists already: choose another hydra.sweep.dir.{hint}") from None
        except OSError as error:
            raise ConfigError(f"{candidate} cannot be created: {error.strerror}.") from None
    raise AssertionError("numbered() is endless")
