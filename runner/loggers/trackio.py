"""A run in Trackio's local database: `TRACKIO_DIR=outputs/trackio trackio show --project runner`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner.loggers.logged_run import LoggedRow, LoggedRun


class TrackioLogger:
    """Writes rows, with samples as tables, into the SQLite file of a project; the jobs of a sweep are a group.

    It writes through Trackio's storage, which ignores a row whose id it has: a resume hands it all rows again.
    `trackio.init` would identify the run by its name, and log from a thread.
    """

    REQUIRES = ("trackio",)
    LOCATIONS = ("dir",)

    def __init__(self, dir: str, project: str) -> None:
        """`dir` is the folder of Trackio's databases, `project` the name of the one to write into."""
        self._dir, self._project = Path(dir), project
        self._storage: Any = None
        self._run: LoggedRun | None = None
        self._name = ""

    def load(self, run: LoggedRun) -> None:
        """Import Trackio, which reads its folder from the environment at that moment.

        Raises:
            RuntimeError: it was imported before, with another folder.
        """
        os.environ["TRACKIO_DIR"] = str(self._dir)
        from trackio import utils

        if Path(utils.TRACKIO_DIR) != self._dir:
            raise RuntimeError(f"this process writes to {utils.TRACKIO_DIR} already")

    def open(self, run: LoggedRun) -> None:
        """Write the settings and the rows that the database lacks."""
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.validate_project_name(self._project)
        self._storage, self._run = SQLiteStorage, run
        # Trackio groups rows by id and name, and loses the rows' ids where it renames a run: the first name stays.
        names = {record["id"]: record["name"] for record in SQLiteStorage.get_run_records(self._project)}
        self._name = names.get(run.id) or run.name
        self._log(run.rows)

    def log(self, row: LoggedRow) -> None:
        """Log a row."""
        self._log([row])

    def close(self, state: str) -> None:
        """There is nothing to close."""

    def _log(self, rows: Sequence[LoggedRow]) -> None:
        assert self._run is not None
        self._storage.bulk_log(
            self._project,
            self._name,
            [_values(row) for row in rows],
            steps=[row.step for row in rows],
            timestamps=[datetime.fromtimestamp(row.seconds or time.time(), UTC).isoformat() for row in rows],
            config={
                **self._run.config,
                "_Group": self._run.group,
                "_Tags": list(self._run.tags),
                "_Note": self._run.note,
            },
            log_ids=[f"{self._run.id}-{row.key}" for row in rows],
            run_id=self._run.id,
        )


def _values(row: LoggedRow) -> dict[str, Any]:
    values: dict[str, Any] = dict(row.values())
    if row.samples:  # as trackio.Table, which is a mapping in the database
        values[f"{row.split}/samples"] = {"_type": "trackio.table", "_value": [dict(sample) for sample in row.samples]}
    return values
