"""A run of Weights & Biases, offline unless the config says otherwise: `wandb sync RUN/wandb/offline-run-*`."""

from __future__ import annotations

import importlib
import os
import shutil
from typing import Any

from runner.common.errors import ConfigError
from runner.loggers.logged_run import LoggedRow, LoggedRun

_FOLDER = "wandb"
"""Where W&B writes, in the folder that it is given."""
_MODES = ("offline", "online")
_FINISH_SECONDS = 10


class WandbLogger:
    """Logs rows, with samples as tables, and the settings; the jobs of a sweep are a group.

    The nth row is W&B's step n, and charts are over `step`, the number of updates: W&B's own step takes one row only.
    Offline, the record is written anew from the rows that are kept, at the start of each process. Online, W&B takes
    nothing back: it knows how many rows it has, and those are not logged again.
    """

    REQUIRES = ("wandb",)

    def __init__(self, project: str, entity: str | None, mode: str) -> None:
        """`entity` is a user or team, None for the default one; `mode` is offline or online.

        Raises:
            ConfigError: there is no such mode.
        """
        if mode not in _MODES:
            raise ConfigError(f"loggers.wandb.mode={mode} is invalid: must be one of {', '.join(_MODES)}.")
        self._project, self._entity, self._mode = project, entity, mode
        self._run: Any = None
        self._skipped = 0
        self._count = 0

    def load(self, run: LoggedRun) -> None:
        """Import W&B, with its error reports off and its folders in the run directory."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for variable, name in (("WANDB_CACHE_DIR", "cache"), ("WANDB_DATA_DIR", "data")):
            os.environ.setdefault(variable, str(run.path / _FOLDER / name))
        importlib.import_module("wandb")

    def open(self, run: LoggedRun) -> None:
        """Start the record of `run`, or continue it, and log the rows that it lacks.

        Raises:
            OSError: the folder `wandb` of the run is a link.
            RuntimeError: online, and W&B has no credentials.
        """
        import wandb

        folder = run.path / _FOLDER
        if folder.is_symlink():
            raise OSError(f"{folder} is a symbolic link, which is not followed")
        folder.mkdir(exist_ok=True)
        offline = self._mode == "offline"
        if offline:
            for old in folder.glob(f"offline-run-*-{run.id}"):
                shutil.rmtree(old)
        elif not wandb.login(prompt=False):
            raise RuntimeError("W&B has no credentials: set WANDB_API_KEY, or run `wandb login`")
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            mode="offline" if offline else "online",
            id=run.id,
            resume=None if offline else "allow",
            name=run.name,
            notes=run.note,
            group=run.group,
            tags=[tag[:64] for tag in run.tags],
            config=dict(run.config),
            dir=str(run.path),
            settings=_settings(wandb),
        )
        self._run.define_metric("*", step_metric="step")
        self._skipped, self._count = self._run.step, 0
        for row in run.rows:
            self.log(row)

    def log(self, row: LoggedRow) -> None:
        """Log a row, unless W&B has it."""
        import wandb

        self._count += 1
        if self._count <= self._skipped:
            return
        values: dict[str, Any] = {"step": row.step, **row.values()}
        if row.seconds:
            values["_timestamp"] = row.seconds
        if row.samples:
            columns = list(row.samples[0])
            data = [[sample.get(column) for column in columns] for sample in row.samples]
            values[f"{row.split}/samples"] = wandb.Table(columns=columns, data=data)
        self._run.log(values)

    def close(self, state: str) -> None:
        """End the record; a run that neither finished nor stopped counts as failed."""
        if self._run is not None:
            self._run.finish(exit_code=0 if state in ("finished", "stopped") else 1)
            self._run = None


def _settings(wandb: Any) -> Any:
    """Return settings with which W&B prints nothing, and collects nothing about machine, user and packages."""
    return wandb.Settings(
        console="off",
        silent=True,
        host="",
        disable_git=True,
        save_code=False,
        finish_timeout=_FINISH_SECONDS,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
