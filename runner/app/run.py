"""Compose the config with Hydra, check it, open the output directory, hand over to training or to a sweep.

Hydra and OmegaConf are known at this edge only (here, in `composed`, `sentences` and `sweeps`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.app import guard
from runner.app.errors import translate_error
from runner.app.resolve import require_adapter, resolve_config, stored_config
from runner.checkpoints import mirror
from runner.common.errors import ConfigError, DirectoryInUse, RunnerError
from runner.config import schema, validation
from runner.config.groups import CONF_DIR
from runner.config.invocation import Invocation
from runner.config.quoting import quote_path, unquote
from runner.config.schema import Config
from runner.runs import sweep_manifest
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import RunSpec, find_resume_source, new_run_id
from runner.sweeps import grid

_said = Invocation()
_claimed: RunDirectory | None = None
"""The directory of a new run, held from the moment it is claimed."""


class Refused(BaseException):
    """Carries an error past Hydra: of a callback it would make a warning, of a job a report of its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def start(said: Invocation, program: str) -> None:
    """Run what was said: one run, or a sweep of them.

    Raises:
        RunnerError: with the sentence and the exit code for the door.
    """
    global _said, _claimed
    _said, _claimed = said, None
    words = list(said.arguments)
    if said.resume is not None and (said.resume / sweep_manifest.NAME).is_file():
        words = _words_of_sweep(said)
    if said.resume or said.repeat:
        _store_config_of(said)
        words.append("stored=run")
    register()
    guard.install_guard({*said.hydra_settings, *said.settings})
    sys.argv = [program, *words]
    try:
        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(Task(said))()
    except Refused as refused:
        if isinstance(refused.error, RunnerError):
            raise refused.error from refused
        raise translate_error(refused.error) from refused.error


def run_sweep(
    arguments: Sequence[str],
    params: dict[str, Any] | None,
    launcher: Launcher,
    context: HydraContext,
    config: DictConfig,
) -> list[JobReturn]:
    """What our sweeper calls: the sweep of this invocation. Its errors go past Hydra to the door."""
    from runner.sweeps import sweep

    try:
        return sweep.run_sweep(
            arguments, params=params, launcher=launcher, context=context, config=config, invocation=_said
        )
    except Exception as error:
        raise Refused(error) from error


class Opening(Callback):
    """Checks the composed config and claims the output directory before Hydra writes a byte into it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """A plain run: the directory is new and ours, or that of the run to resume."""
        with _refusals():
            validation.refuse_secrets(OmegaConf.to_container(config.hydra, resolve=False), "hydra")
            resolved = resolve_config(_without_hydra(config))
            validation.validate_stop_at(_said.stop_at, resolved)
            require_adapter(resolved)
            named = "hydra.run.dir" in _said.hydra_settings
            from_backup = _said.resume is not None and mirror.is_backup(_said.resume)
            if _said.resume is not None and not from_backup and not find_resume_source(_said.resume).branch:
                directory = find_resume_source(_said.resume).run
                if named:
                    raise ConfigError("resume=RUN goes on in RUN itself; hydra.run.dir is for a branch or a new run.")
                _hold(directory, config.checkpoint.dir)
                _set(config, "hydra.output_subdir", None)  # the first start's .hydra/ stays
            else:
                directory = _claim(Path(config.hydra.run.dir), config.checkpoint.dir, named=named)
            if from_backup:
                _restore()
            _set(config, "hydra.run.dir", str(directory))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A sweep: its directory is new and ours, or that of the sweep to finish."""
        with _refusals():
            if _said.resume is not None:
                raise ConfigError("resume=RUN goes on with one run: leave out -m. To vary it: repeat=RUN with -m.")
            validation.refuse_secrets(OmegaConf.to_container(config, resolve=False))
            folder = Path(config.hydra.sweep.dir)
            if _said.sweep is None:
                folder = _claim_sweep(folder, named="hydra.sweep.dir" in _said.hydra_settings)
            _set(config, "hydra.sweep.dir", str(folder.absolute()))


class Task:
    """The task function of Hydra: called with the composed config of a run, or of a sweep's job by a launcher.

    Launchers find the invocation in it, also those that call it in another process.
    """

    def __init__(self, invocation: Invocation) -> None:
        self.invocation = invocation

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run it. A job raises; a plain run's error goes straight out."""
        return _job(cfg, self.invocation)


def _job(cfg: DictConfig, invocation: Invocation) -> float | None:
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    experiment = hydra_config.runtime.choices.get("experiment")
    if hydra_config.mode == RunMode.MULTIRUN:
        from runner.sweeps.job import run_job

        overrides = [word for word in hydra_config.overrides.task if not word.startswith("stored=")]
        return run_job(
            cfg,
            folder,
            number=hydra_config.job.num,
            label=" ".join(overrides),
            experiment=experiment,
            stop_at=invocation.stop_at,
        )
    try:
        from runner.backends.cpu import blas

        report = blas.load_blas()  # before MLX is imported
        from runner.training.run import run

        config = resolve_config(cfg)
        config.experiment = experiment
        directory = RunDirectory(folder, config.checkpoint.dir) if _claimed is None else _claimed
        source = None if _said.resume is None else find_resume_source(_said.resume)
        stored = stored_config(cfg, config)
        if source is not None and not source.branch:
            stored |= {"experiment": directory.read_config().get("experiment")}
        return run(RunSpec(config, stored, directory, source, new_run_id(), stop_at=invocation.stop_at), report)
    except Exception as error:
        raise Refused(error) from error


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="schema", node=Config)


def _words_of_sweep(said: Invocation) -> list[str]:
    """The words of the sweep to finish, with those typed now on top; `said` then describes that sweep."""
    assert said.resume is not None
    folder, said.resume = said.resume.absolute(), None
    said.sweep = folder
    if said.repeat is not None:
        raise ConfigError(f"resume={folder} finishes a sweep with its own settings: leave out repeat=.")
    typed = [word for word in said.arguments if word not in ("-m", "--multirun")]
    known = sweep_manifest.read_manifest(folder)
    if not known.words:
        raise ConfigError(
            f"resume={folder}: {sweep_manifest.NAME} holds no words of a sweep: there is nothing to finish."
        )
    guard.check_sweep_manifest(known, said.settings)
    said.arguments = grid.merge_overrides([word for word in known.words if not word.startswith("repeat=")], typed)
    said.repeat = next((Path(unquote(word[7:])) for word in known.words if word.startswith("repeat=")), None)
    return ["-m", *said.arguments, f"hydra.sweep.dir={quote_path(str(folder))}"]


def _store_config_of(said: Invocation) -> None:
    """Make the stored config of the run that is resumed or repeated a part of the composition."""
    if said.resume and said.repeat:
        raise ConfigError("resume= and repeat= exclude each other: go on with a run, or start a new one like it.")
    run = find_resume_source(said.resume).run if said.resume else said.repeat
    assert run is not None
    config = schema.from_dict(RunDirectory(run).read_config(), str(run / "config.yaml"))
    data = schema.to_dict(config)
    data = {section: value for section, value in data.items() if section not in said.group_choices}
    for name in schema.provenance_settings():
        data.pop(name, None)
    if said.resume:
        data.pop("adapter", None)  # provenance: the checkpoint holds the weights
    # scale and alpha are two names for one thing: the one typed replaces the one stored.
    if "lora" in data and "lora.alpha" in said.settings and "lora.scale" not in said.settings:
        data["lora"]["scale"] = None
    if "lora" in data and "lora.scale" in said.settings and "lora.alpha" not in said.settings:
        data["lora"]["alpha"] = None
    ConfigStore.instance().store(group="stored", name="run", package="_global_", node=data)


def _claim(path: Path, checkpoints: str, named: bool) -> Path:
    """Claim `path` for a new run; a path made from the time gets -2, -3, … where another run was as quick."""
    global _claimed
    number = 1
    while True:
        target = (path if number == 1 else path.with_name(f"{path.name}-{number}")).absolute()
        try:
            _claimed = RunDirectory(target, checkpoints)
            _claimed.claim()
            return target
        except (ConfigError, DirectoryInUse):
            if named or not target.is_dir():
                raise
            number += 1


def _hold(path: Path, checkpoints: str) -> None:
    """Take the lock of the run to resume now, before anything heavy is imported."""
    global _claimed
    _claimed = RunDirectory(path, checkpoints)
    _claimed.lock()


def _restore() -> None:
    """Fill the directory just claimed from the backup that resume= names: the run goes on there."""
    assert _claimed is not None and _said.resume is not None
    try:
        said = mirror.restore(_said.resume.absolute(), _claimed)
    except RunnerError:
        _claimed.abandon()
        raise
    for line in [f"restored {_said.resume} into {_claimed.path}", *said]:
        print(line)
    _said.resume = _claimed.path


def _claim_sweep(path: Path, named: bool) -> Path:
    """Claim `path` for a new sweep, as `_claim` does for a run: what a start left that was cut off is taken over."""
    number = 1
    while True:
        target = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            target.mkdir(parents=True)
            return target
        except FileExistsError:
            if named:
                if sweep_manifest.was_cut_off(target):
                    return target
                hint = (
                    f" To finish the sweep in it: resume={target}." if (target / sweep_manifest.NAME).exists() else ""
                )
                raise ConfigError(f"{target} exists already: choose another hydra.sweep.dir.{hint}") from None
            number += 1
        except OSError as error:
            raise ConfigError(f"{target} cannot be made: {error.strerror}.") from None


def _without_hydra(config: DictConfig) -> DictConfig:
    plain = copy.deepcopy(config)
    with read_write(plain), open_dict(plain):
        del plain["hydra"]
    return plain


def _set(config: DictConfig, name: str, value: Any) -> None:
    with read_write(config), open_dict(config):
        OmegaConf.update(config, name, value)


class _refusals:
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RunnerError):
            raise Refused(error) from error
        if isinstance(error, Exception):
            raise Refused(translate_error(error)) from error
