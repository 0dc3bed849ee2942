"""Compose the config with Hydra, check it, open the run directory, hand over to training.

Hydra and OmegaConf are known here and in the door only; below there are plain dataclasses.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner import checks
from runner import config as schema
from runner.config import Config
from runner.errors import ConfigError, RunnerError
from runner.rundir import RunDirectory
from runner.start import Start, find_source, new_run_id
from runner.words import CONF, Invocation

_said = Invocation()


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
    global _said
    _said = said
    words = list(said.words)
    if said.resume or said.repeat:
        _store_config_of(said)
        words.append("stored=run")
    _register()
    sys.argv = [program, *words]
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(_job)()
    except Refused as refused:
        raise refused.error from refused


class Opening(Callback):
    """Checks the composed config and claims the output directory before Hydra writes a byte into it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """A plain run: the directory is new and ours, or that of the run to resume."""
        with _refusals():
            checked(_without_hydra(config))
            if _said.resume is not None and not find_source(_said.resume).branch:
                directory = find_source(_said.resume).run
                _set(config, "hydra.output_subdir", None)  # the first start's .hydra/ stays
            else:
                directory = _claim(Path(config.hydra.run.dir), named="hydra.run.dir" in str(sys.argv))
            _set(config, "hydra.run.dir", str(directory))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A sweep: its directory is new and ours."""
        with _refusals():
            if _said.resume is not None:
                raise ConfigError(
                    "resume= goes on with one run: leave out -m. To vary a stored run: repeat=RUN with -m."
                )
            checks.refuse_secrets(OmegaConf.to_container(_without_hydra(config), resolve=False))
            folder, number = Path(config.hydra.sweep.dir), 1
            while True:
                target = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
                try:
                    target.mkdir(parents=True)
                    break
                except FileExistsError:
                    if "hydra.sweep.dir" in str(sys.argv):
                        raise ConfigError(f"{target} exists already: choose another hydra.sweep.dir.") from None
                    number += 1
                except OSError as error:
                    raise ConfigError(f"{target} cannot be made: {error.strerror}.") from None
            _set(config, "hydra.sweep.dir", str(target.absolute()))


def checked(cfg: DictConfig) -> Config:
    """The composed config as checked dataclasses, with absolute paths.

    Raises:
        ConfigError: a value that cannot be, or one that looks like a secret.
    """
    checks.refuse_secrets(OmegaConf.to_container(cfg, resolve=False))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError("\n".join(f"{m} has no value: choose {m.split('.')[0]}=NAME or set it." for m in missing))
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    checks.check(config)
    config = checks.complete(config)
    for section in (config.model, config.data):
        section.path = _absolute(section.path)
    if config.adapter:
        config.adapter = _absolute(config.adapter)
    return config


def stored_form(cfg: DictConfig, config: Config) -> dict[str, Any]:
    """What config.yaml holds: every setting resolved, except that ${oc.env:…} stays as written."""
    data = schema.to_dict(config)
    _keep_environment(data, OmegaConf.to_container(cfg, resolve=False))
    return data


def _job(cfg: DictConfig) -> float | None:
    """What Hydra calls, for a run or each job of a sweep. A job raises; a plain run's error goes straight out."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _run(cfg)
    try:
        return _run(cfg)
    except Exception as error:
        raise Refused(error) from error


def _run(cfg: DictConfig) -> float | None:
    """One run; returns its best validation loss."""
    from runner import blas

    report = blas.prepare()  # before MLX is imported
    from runner.training.run import run

    config = checked(cfg)
    hydra_config = HydraConfig.get()
    config.experiment = hydra_config.runtime.choices.get("experiment")
    directory = RunDirectory(Path(hydra_config.runtime.output_dir), config.checkpoint.dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        directory.claim(made_by_hydra=True)
        overrides = [o for o in hydra_config.overrides.task if not o.startswith("stored=")]
        print(f"\njob {hydra_config.job.num}: {' '.join(overrides) or 'no overrides'}", flush=True)
    source = None if _said.resume is None else find_source(_said.resume)
    begun = Start(
        config=config,
        stored=stored_form(cfg, config),
        directory=directory,
        source=source,
        run_id=new_run_id(),
    )
    return run(begun, report)


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)


def _store_config_of(said: Invocation) -> None:
    """Make the stored config of the run that is resumed or repeated a part of the composition."""
    if said.resume and said.repeat:
        raise ConfigError("resume= and repeat= exclude each other: go on with a run, or start a new one like it.")
    if said.resume:
        run = find_source(said.resume).run
    else:
        assert said.repeat is not None
        run = said.repeat
    config = schema.from_dict(RunDirectory(run).read_config(), str(run / "config.yaml"))
    data = schema.to_dict(config)
    data = {section: value for section, value in data.items() if section not in said.chosen}
    for name in schema.INVOCATION:
        section, _, key = name.rpartition(".")
        (data.get(section, {}) if section else data).pop(key, None)
    if said.resume:
        data.pop("adapter", None)  # provenance: the checkpoint holds the weights
    # scale and alpha are two names for one thing: the one typed replaces the one stored.
    if "lora" in data and "lora.alpha" in said.typed and "lora.scale" not in said.typed:
        data["lora"]["scale"] = None
    if "lora" in data and "lora.scale" in said.typed and "lora.alpha" not in said.typed:
        data["lora"]["alpha"] = None
    ConfigStore.instance().store(group="stored", name="run", package="_global_", node=data)


def _claim(path: Path, named: bool) -> Path:
    """Claim `path` for a new run; a path made from the time gets -2, -3, … where another run was as quick."""
    number = 1
    while True:
        target = (path if number == 1 else path.with_name(f"{path.name}-{number}")).absolute()
        try:
            RunDirectory(target).claim()
            return target
        except ConfigError:
            if named or not target.is_dir():
                raise
            number += 1


def _without_hydra(config: DictConfig) -> DictConfig:
    plain = copy.deepcopy(config)
    with read_write(plain), open_dict(plain):
        del plain["hydra"]
    return plain


def _set(config: DictConfig, name: str, value: Any) -> None:
    with read_write(config), open_dict(config):
        OmegaConf.update(config, name, value)


def _absolute(path: str) -> str:
    found = Path(path).expanduser()
    return str(found.absolute()) if found.exists() else path


def _keep_environment(data: dict[str, Any], raw: Any) -> None:
    for key, value in raw.items() if isinstance(raw, Mapping) else ():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict):
            _keep_environment(data[key], value)
        elif isinstance(value, str) and "${oc.env" in value:
            data[key] = value


class _refusals:
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RunnerError):
            raise Refused(error) from error
        if isinstance(error, Exception):
            from runner.sentences import explain

            raise Refused(explain(error)) from error
