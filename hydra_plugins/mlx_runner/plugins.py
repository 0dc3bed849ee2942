"""hydra/sweeper=grid (the default), hydra/launcher=serial (the default), process, ray and submitit.

The classes only delegate, so that Hydra, which imports this module at every start, imports nothing heavy with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig

from runner.config.search_settings import SearchSettings

if TYPE_CHECKING:
    from runner.sweeps.job import JobTask
    from runner.sweeps.launchers.executor import JobExecutor
    from runner.sweeps.plan import PlannedJob


class GridSweeper(Sweeper):
    """Runs every combination of the swept values; resume= finishes and extends such a sweep."""

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self._params = params

    def setup(self, *, hydra_context: HydraContext, task_function: JobTask, config: DictConfig) -> None:
        """Keep what Hydra passes to its plugins."""
        from hydra.core.plugins import Plugins

        self._context, self._config = hydra_context, config
        self._invocation = task_function.invocation
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep of the overrides `arguments`."""
        from runner.sweeps.sweep import run_sweep

        return run_sweep(
            arguments,
            params=self._params,
            launcher=self.launcher,
            context=self._context,
            composed=self._config,
            invocation=self._invocation,
        )


class SearchSweeper(GridSweeper):
    """Searches the swept values: trials are suggested, compared at rungs, and the best continue."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def sweep(self, arguments: list[str]) -> Any:
        """Run the search of the overrides `arguments`."""
        from runner.sweeps.search.start import run_search

        return run_search(
            arguments,
            options=self._options,
            launcher=self.launcher,
            context=self._context,
            composed=self._config,
            invocation=self._invocation,
        )


class _Launcher(Launcher):
    """A launcher of ours. A sweeper may call `launch` many times: what is loaded stays until `close`, which the end of
    the sweep calls for the `launcher` of a sweeper."""

    def __init__(self, fail_fast: bool = False) -> None:
        self._fail_fast = fail_fast
        self._executor: JobExecutor | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: JobTask, config: DictConfig) -> None:
        """Keep what Hydra passes to its plugins, and refuse an invalid option before the sweep is recorded."""
        from runner.common.errors import ConfigError

        self.context, self.config = hydra_context, config
        self.invocation = task_function.invocation
        if type(self._fail_fast) is not bool:
            raise ConfigError(f"hydra.launcher.fail_fast={self._fail_fast} is invalid: must be true or false.")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs."""
        return self._open().launch(job_overrides)

    def run_jobs(self, jobs: Sequence[PlannedJob]) -> Sequence[JobReturn]:
        """Run recorded jobs of the sweep: what `launch` does, without looking them up."""
        return self._open().run(jobs)

    @property
    def fail_fast(self) -> bool:
        """Whether no job is started after one has failed."""
        return self._fail_fast

    def at_once(self) -> int:
        """Return how many jobs it runs at once."""
        return self._open().at_once()

    def close(self) -> None:
        """Free what it keeps from one launch to the next."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def _open(self) -> JobExecutor:
        if self._executor is None:
            self._executor = self._make_executor()
        return self._executor

    def _make_executor(self) -> JobExecutor:
        raise NotImplementedError


class SerialLauncher(_Launcher):
    """Runs jobs one after the other in this process; they share the base model and the data."""

    def _make_executor(self) -> JobExecutor:
        from runner.sweeps.launchers.serial import SerialExecutor

        return SerialExecutor(self.context, self.config, self.invocation, self._fail_fast)


class ProcessLauncher(_Launcher):
    """Runs jobs in worker processes, several at once."""

    def __init__(self, jobs: int | None = None, fail_fast: bool = False) -> None:
        super().__init__(fail_fast)
        self._jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: JobTask, config: DictConfig) -> None:
        """Keep what Hydra passes to its plugins, and refuse an invalid option before the sweep is recorded."""
        from runner.sweeps.launchers.options import require_valid

        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        require_valid({"jobs": self._jobs}, count={"jobs"})

    def _make_executor(self) -> JobExecutor:
        from runner.sweeps.launchers.process import ProcessExecutor

        return ProcessExecutor(self.context, self.config, self.invocation, self._fail_fast, limit=self._jobs)


class RayLauncher(_Launcher):
    """Runs jobs on the nodes of a Ray cluster."""

    def __init__(
        self,
        address: str | None = None,
        jobs: int | None = None,
        cpus: float | None = None,
        gpus: float = 0,
        fail_fast: bool = False,
    ) -> None:
        super().__init__(fail_fast)
        self._options: dict[str, Any] = {"address": address, "jobs": jobs, "cpus": cpus, "gpus": gpus}

    def setup(self, *, hydra_context: HydraContext, task_function: JobTask, config: DictConfig) -> None:
        """Keep what Hydra passes to its plugins, and refuse an invalid option before the sweep is recorded."""
        from runner.sweeps.launchers.options import require_package, require_reachable, require_valid

        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        require_valid(self._options, text={"address"}, count={"jobs"}, amount={"cpus", "gpus"})
        require_package("ray", "hydra/launcher=ray")
        require_reachable(self._options["address"])

    def _make_executor(self) -> JobExecutor:
        from runner.sweeps.launchers.ray_executor import RayExecutor, RayOptions

        options = RayOptions(**self._options)
        return RayExecutor(self.context, self.config, self.invocation, self._fail_fast, options)


class SubmititLauncher(_Launcher):
    """Runs each job as a job of SLURM."""

    def __init__(self, fail_fast: bool = False, **options: Any) -> None:
        super().__init__(fail_fast)
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: JobTask, config: DictConfig) -> None:
        """Keep what Hydra passes to its plugins, and refuse an invalid option before the sweep is recorded."""
        from runner.sweeps.launchers.options import require_cluster, require_package, require_valid

        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self._options["setup"] = list(self._options.get("setup") or [])
        require_valid(
            self._options,
            text={"folder"},
            names={"partition", "account"},
            count={"jobs", "timeout_min", "signal_delay_s", "cpus", "gpus"},
            amount={"mem_gb"},
            texts={"setup"},
        )
        require_cluster(self._options.get("cluster"))
        require_package("submitit", "hydra/launcher=submitit", extra="slurm")

    def _make_executor(self) -> JobExecutor:
        from runner.sweeps.launchers.submitit_executor import SubmititExecutor, SubmititOptions

        options = SubmititOptions(**self._options)
        return SubmititExecutor(self.context, self.config, self.invocation, self._fail_fast, options)


_MODULE = "hydra_plugins.mlx_runner.plugins"
_GRID = {"_target_": f"{_MODULE}.GridSweeper", "params": {}}
_SEARCH = {"_target_": f"{_MODULE}.SearchSweeper", **asdict(SearchSettings()), "params": {}}
_SERIAL = {"_target_": f"{_MODULE}.SerialLauncher", "fail_fast": False}
# jobs: how many at once; null means as many as fit memory and cores, and one on a GPU.
_PROCESS = {"_target_": f"{_MODULE}.ProcessLauncher", "jobs": None, "fail_fast": False}
_RAY = {
    "_target_": f"{_MODULE}.RayLauncher",
    "address": None,  # null joins a cluster that runs on this machine, or starts one here
    "jobs": None,  # at once on each node; null as with process
    "cpus": None,  # that each job asks of its node, as Ray counts them; null is one for each of its ranks
    "gpus": 0,
    "fail_fast": False,
}
_SUBMITIT: dict[str, Any] = {
    "_target_": f"{_MODULE}.SubmititLauncher",
    "cluster": "slurm",  # or local, for tests on one machine; null finds out
    "folder": None,  # of submitit's files; null means logs/submitit in that of the sweep
    "jobs": 16,  # at once
    "timeout_min": 240,  # of each job; one that needs longer continues in another
    "signal_delay_s": 120,  # seconds before that, for the save
    "cpus": 4,  # of each job, with all of its ranks
    "gpus": None,
    "mem_gb": None,
    "partition": None,
    "account": None,
    "setup": [],  # lines of shell before each job, such as module load
    "fail_fast": False,
}
_store = ConfigStore.instance()
for _group, _name, _node in (
    # Hydra's default choices are called basic. Ours take the name: an override in the defaults list of
    # conf/config.yaml would win over the one in a recipe.
    ("hydra/sweeper", "basic", _GRID),
    ("hydra/sweeper", "grid", _GRID),
    ("hydra/sweeper", "search", _SEARCH),
    ("hydra/launcher", "basic", _SERIAL),
    ("hydra/launcher", "serial", _SERIAL),
    ("hydra/launcher", "process", _PROCESS),
    ("hydra/launcher", "ray", _RAY),
    ("hydra/launcher", "submitit", _SUBMITIT),
):
    _store.store(group=_group, name=_name, node=_node, provider="mlx_runner")
