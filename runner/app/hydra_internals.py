"""Everything of ours that reaches into `hydra._internal`, each with its reason.

Hydra's public entry points do not serve: `hydra.main` reads `sys.argv` and composes before any code of ours can check
a file, and `hydra.compose` knows neither `--config-dir` nor sweeps. hydra-core is pinned to the version used here.
"""

from __future__ import annotations

from argparse import ArgumentError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig

from runner.common.errors import ConfigError
from runner.common.text import shorten

__all__ = ["Callbacks", "CheckedLoader", "Hydra", "job_error", "open_hydra", "parse_flags", "print_requested"]
# `Callbacks` calls the callbacks of hydra.callbacks. Reason: HydraContext, which is public, holds one.

VERSION_BASE = "1.3"
JOB_NAME = "runner"
"""hydra.job.name."""


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's config loader with a check of each file before it is parsed and of each config after it is composed.

    Reason: Hydra has no hook there, and all that it composes (a run, a sweep, each job of a sweep, also in a worker
    process) goes through its loader. The checks are picklable, and so is the loader.
    """

    def __init__(
        self,
        search_path: ConfigSearchPath,
        check_file: Callable[[Path], None],
        check_config: Callable[[DictConfig], None],
    ) -> None:
        super().__init__(search_path)
        self.repository = _CheckedRepository(search_path, check_file)
        self._check_config = check_config

    def has_group(self, name: str) -> bool:
        """Return whether a folder of configs or a registered group has this name.

        Reason: Hydra decides so whether an override chooses from a group, and only its repository knows.
        """
        return bool(self.repository.group_exists(name))

    def load_configuration(self, *args: Any, **options: Any) -> DictConfig:
        """Compose a config and check it.

        Raises:
            ConfigError: nested too deeply, or an environment variable of hydra.job.env_copy is not set.
        """
        try:
            config = super().load_configuration(*args, **options)
        except RecursionError:
            raise ConfigError("A setting is nested too deeply to be read.") from None
        except KeyError as error:  # what Hydra raises for hydra.job.env_copy
            raise ConfigError(f"A config names {shorten(error)}, which is not set.") from None
        self._check_config(config)
        return config


class _CheckedRepository(ConfigRepository):
    def __init__(self, search_path: ConfigSearchPath, check_file: Callable[[Path], None]) -> None:
        super().__init__(search_path)
        self._check_file = check_file

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        # Compared by its scheme: Hydra loads the modules of its plugins twice, so `isinstance` fails.
        if source is not None and source.scheme() == "file":
            self._check_file(Path(source.path) / source._normalize_file_name(config_path))
        return super().load_config(config_path)


def parse_flags(arguments: Sequence[str]) -> Namespace:
    """Parse `arguments` with Hydra's own parser; `overrides` are the arguments that are no flags.

    Reason: `hydra.main` parses `sys.argv` only.

    Raises:
        ConfigError: a flag without its value, or with a value that is not one of its choices.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ConfigError(f"{error}.") from None


def search_path(primary: str, config_dir: str | None) -> ConfigSearchPath:
    """Return the search path for configs: `primary`, Hydra's own configs, and first of all `config_dir`.

    Reason: `hydra.main` builds it from `sys.argv`; its builder also asks the search path plugins.

    Raises:
        ConfigError: there is no such `config_dir`.
    """
    version.setbase(VERSION_BASE)
    path = create_config_search_path(primary)
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir}: there is no such folder.")
        schema = SearchPathQuery(provider="schema")
        path.prepend(provider="command-line", path=f"file://{Path(config_dir).absolute()}", anchor=schema)
    return path


@contextmanager
def open_hydra(loader: CheckedLoader) -> Iterator[Hydra]:
    """Create the `Hydra` object, which composes and prints; some plugins look for it in `GlobalHydra`.

    Reason: it registers the resolvers `now` and `hydra`, sets hydra.job.name and configures hydra.hydra_logging.
    """
    hydra = Hydra(task_name=JOB_NAME, config_loader=loader)
    GlobalHydra.instance().initialize(hydra)
    try:
        yield hydra
    finally:
        GlobalHydra.instance().clear()


def compose(hydra: Hydra, config_name: str, overrides: list[str], multirun: bool) -> DictConfig:
    """Compose the config of a run, or of a sweep, with Hydra's own node; `hydra.mode` of the result tells which.

    Reason: `hydra.main` composes once to learn hydra.mode, which a file may set, and then again.
    """
    overrides = [*overrides, *(["hydra.mode=MULTIRUN"] if multirun else [])]
    config = hydra.compose_config(
        config_name=config_name,
        overrides=overrides,
        run_mode=RunMode.MULTIRUN if multirun else RunMode.RUN,
        with_log_configuration=True,
        validate_sweep_overrides=False,
    )
    if config.hydra.mode is None:
        config.hydra.mode = RunMode.RUN
    parsed = OverridesParser.create().parse_overrides(overrides)
    ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, run_mode=config.hydra.mode, from_shell=True)
    return config


def print_requested(hydra: Hydra, config_name: str, flags: Namespace) -> None:
    """Print what --cfg, --info, --shell-completion or --hydra-help asks for.

    Reason: `hydra.main` does it for `sys.argv` only.

    Raises:
        ConfigError: several of them at once.
    """
    asked = [bool(flags.cfg), flags.info is not None, flags.shell_completion, flags.hydra_help, flags.multirun]
    if sum(asked) > 1:
        raise ConfigError("Only one of -m, --cfg, --info, --shell-completion and --hydra-help can be used at once.")
    if flags.hydra_help:
        # It is composed without the primary config, which turns Hydra's own logging off.
        flags.overrides += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        hydra.hydra_help(config_name=config_name, args_parser=get_args_parser(), args=flags)
    elif flags.shell_completion:
        hydra.shell_completion(config_name=config_name, overrides=flags.overrides)
    elif flags.info is not None:
        # Hydra reports a wrong config itself where it prints it: composed here first, the error is raised.
        hydra.compose_config(config_name=config_name, overrides=flags.overrides, run_mode=RunMode.RUN)
        hydra.show_info(flags.info, config_name=config_name, overrides=flags.overrides)
    else:
        hydra.show_cfg(
            config_name=config_name,
            overrides=flags.overrides,
            cfg_type=flags.cfg,
            package=flags.package,
            resolve=flags.resolve,
        )


def override_dirname(overrides: Sequence[str], options: DictConfig) -> str:
    """Return hydra.job.override_dirname, the overrides of a job as one name.

    Reason: Hydra computes it where it composes a job; ours are composed from their records.
    """
    return str(
        get_overrides_dirname(
            overrides=OverridesParser.create().parse_overrides(list(overrides)),
            kv_sep=options.kv_sep,
            item_sep=options.item_sep,
            exclude_keys=options.exclude_keys,
        )
    )


def job_error(job: JobReturn) -> Exception | None:
    """Return the exception that ended the job, if any.

    Reason: the public `JobReturn.return_value` prints a report of its own and raises.
    """
    return job._return_value if job.status == JobStatus.FAILED else None
