"""A run in MLflow's tracking store: `mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db`."""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from runner.common.errors import ConfigError
from runner.common.text import shorten
from runner.loggers.logged_run import LoggedRow, LoggedRun

_SQLITE = "sqlite:///"
_MAX_METRICS = 1000
_MAX_PARAMS = 100
_MAX_VALUE_LENGTH = 6000
_ID_TAG = "runner.run_id"
_NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as the description of a run."""
_STATUS = {"finished": "FINISHED", "stopped": "KILLED"}


class MlflowLogger:
    """Logs metrics, settings as parameters, the config and samples as artifacts; tags name the run and its sweep.

    MLflow's store takes nothing back. What it holds already is read from it, by metric and step, and not logged again.
    """

    REQUIRES = ("mlflow", "sqlalchemy", "alembic")
    LOCATIONS = ("tracking_uri",)

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        """`tracking_uri` is a SQLite file (sqlite:///PATH) or a server, `experiment` the name of MLflow's experiment.

        Raises:
            ConfigError: the URI has no scheme, or holds a password.
        """
        if "://" not in tracking_uri:
            raise ConfigError(
                f"loggers.mlflow.tracking_uri={shorten(tracking_uri)} is invalid: must be a URI such as "
                "sqlite:///mlflow.db or https://example.org."
            )
        if urlsplit(tracking_uri).password:
            raise ConfigError(
                "loggers.mlflow.tracking_uri holds a password, which would be stored with the run. Set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment instead."
            )
        self._uri, self._experiment = tracking_uri, experiment
        self._file = Path(tracking_uri.removeprefix(_SQLITE)) if tracking_uri.startswith(_SQLITE) else None
        self._client: Any = None
        self._run_id = ""
        self._logged: set[tuple[str, int]] = set()
        self._samples: list[Mapping[str, Any]] = []

    def load(self, run: LoggedRun) -> None:
        """Import MLflow, with its usage reports off."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        importlib.import_module("mlflow.tracking")

    def open(self, run: LoggedRun) -> None:
        """Find the record of `run` or create it, and log the rows that it lacks."""
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # it reports every new table
        with _lock(self._file):
            if self._file and not self._file.exists():
                _create_database(self._file)
            self._client = MlflowClient(self._uri)
            record = self._find_or_create(run)
        self._run_id = record.info.run_id
        names = list(record.data.metrics)
        self._logged = {
            (name, metric.step) for name in names for metric in self._client.get_metric_history(self._run_id, name)
        }
        self._samples = []
        self._log_settings(run, record.data.params)
        self._log(run.rows)

    def log(self, row: LoggedRow) -> None:
        """Log a row."""
        self._log([row])

    def close(self, state: str) -> None:
        """End the record with the status that MLflow has for the `state` of the run."""
        if self._run_id:
            self._client.set_terminated(self._run_id, _STATUS.get(state, "FAILED"))

    def _find_or_create(self, run: LoggedRun) -> Any:
        experiment = self._experiment_id()
        found = self._client.search_runs([experiment], f"tags.`{_ID_TAG}` = '{run.id}'", max_results=1)
        tags = {"runner.sweep": run.group, "runner.tags": ", ".join(run.tags), _NOTE_TAG: run.note}
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING", name=run.name)
            for name, value in tags.items():  # which may have changed since, and be none now
                if (value or "") != found[0].data.tags.get(name, ""):
                    self._client.set_tag(found[0].info.run_id, name, value or "")
            return found[0]
        tags = {name: value for name, value in tags.items() if value}
        tags |= {_ID_TAG: run.id, "runner.directory": str(run.path)}
        return self._client.create_run(experiment, tags=tags, run_name=run.name)

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            # MLflow's default for a file would be ./mlruns.
            location = self._file.with_suffix(".artifacts").as_uri() if self._file else None
            with suppress(Exception):  # another job has just created it
                return str(self._client.create_experiment(self._experiment, artifact_location=location))
            found = self._client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id)

    def _log_settings(self, run: LoggedRun, known: Mapping[str, str]) -> None:
        """Log the settings as parameters, which MLflow does not let change, and the present config as an artifact."""
        from mlflow.entities import Param

        settings = {name: str(value)[:_MAX_VALUE_LENGTH] for name, value in run.settings().items()}
        params = [Param(name, value) for name, value in settings.items() if name not in known]
        for chunk in _chunks(params, _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=chunk)
        text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        self._client.log_text(self._run_id, text, "config.yaml")

    def _log(self, rows: Iterable[LoggedRow]) -> None:
        from mlflow.entities import Metric

        metrics, samples = [], len(self._samples)
        for row in rows:
            milliseconds = round((row.seconds or time.time()) * 1000)
            self._samples += row.samples
            for name, value in row.values().items():
                if (name, row.step) not in self._logged:
                    self._logged.add((name, row.step))
                    metrics.append(Metric(name, float(value), milliseconds, row.step))
        for chunk in _chunks(metrics, _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=chunk)
        if len(self._samples) > samples:
            lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in self._samples]
            self._client.log_text(self._run_id, "".join(lines), "samples.jsonl")


@contextmanager
def _lock(file: Path | None) -> Iterator[None]:
    """Hold a lock beside the database `file`: MLflow makes its tables without one, and two jobs at once spoil them."""
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create_database(file: Path) -> None:
    """Make a database with MLflow's tables: whole or not at all, since MLflow cannot continue where it was killed."""
    from mlflow.tracking import MlflowClient

    draft = file.with_name(f".{file.name}.new")
    draft.unlink(missing_ok=True)
    MlflowClient(f"{_SQLITE}{draft}").search_experiments(max_results=1)
    draft.rename(file)


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
