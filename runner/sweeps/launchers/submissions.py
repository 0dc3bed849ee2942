"""Which jobs of a sweep were submitted to a cluster, so that a resumed sweep finds them: logs/submitit.jsonl.

One JSON object a line, the last one of a job counts:

    {"job": 0, "cluster": "slurm", "id": "1234_0", "folder": …}
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from runner.common.errors import EXIT_FAILED
from runner.runs.rows import RowFile, scan_rows

_NAME = "submitit.jsonl"
_REQUESTS = "requests"
_ID = re.compile(r"\d{1,20}(_\d{1,10})?")
_PENDING = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED"}
"""States of SLURM in which a job will still run or runs."""
_WITH_RESULT = {"COMPLETED", "DONE", "QUEUED"}
"""States whose job has a result, which a slow folder may not show yet; the last two are those of cluster=debug."""
_PREEMPTED_SECONDS = 300.0
"""How long a preempted job may take to appear in the queue again."""


class Submissions:
    """What was submitted for a sweep."""

    def __init__(self, sweep: Path) -> None:
        self._logs = sweep / "logs"
        self._path = self._logs / _NAME
        self._preempted: dict[str, float] = {}
        """When a job of the cluster was first seen as preempted."""

    def request_file(self, folder: str) -> Path:
        """Return the path of the request for the job in `folder`."""
        path = self._logs / _REQUESTS / f"{folder}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, number: int, job: Any, cluster: str) -> None:
        """Record that job `number` of the sweep is the cluster's `job`."""
        file = RowFile(self._path, self._path.stat().st_size if self._path.exists() else 0)
        try:
            folder = str(job.paths.folder)
            file.append({"job": number, "cluster": cluster, "id": str(job.job_id), "folder": folder})
        finally:
            file.close()

    def find(self, number: int) -> Any | None:
        """Return the cluster's job that was submitted for job `number` and has not ended; None where there is none.

        SLURM alone knows jobs that another process submitted.
        """
        rows = [line.row for line in scan_rows(self._path) if line.row is not None] if self._path.exists() else []
        for row in [row for row in rows if row.get("job") == number][-1:]:
            job_id, folder = row.get("id"), row.get("folder")
            if row.get("cluster") != "slurm" or not isinstance(job_id, str) or not isinstance(folder, str):
                continue
            if not _ID.fullmatch(job_id):
                continue
            from submitit import SlurmJob

            job = SlurmJob(folder=folder, job_id=job_id)
            if not job.paths.result_pickle.exists() and job.get_info(mode="force").get("State") in _PENDING:
                return job
        return None

    def is_done(self, job: Any) -> bool:
        """Return whether a job of the cluster has ended. submitit itself waits forever for a preempted one, also where
        it is not put into the queue again."""
        if job.done():
            return True
        if cluster_state(job) != "PREEMPTED":
            self._preempted.pop(job.job_id, None)
            return False
        return time.monotonic() - self._preempted.setdefault(job.job_id, time.monotonic()) > _PREEMPTED_SECONDS

    def result(self, job: Any) -> dict[str, Any] | None:
        """Return what the task of an ended job replied; None where it was ended before."""
        if not job.paths.result_pickle.exists() and cluster_state(job) not in _WITH_RESULT:
            return None
        try:
            reply = job.result()
        except Exception as error:  # whatever submitit or the task raised
            return {"code": EXIT_FAILED, "error": str(error)} if job.paths.result_pickle.exists() else None
        return reply if isinstance(reply, dict) else None


def cluster_state(job: Any) -> str:
    """Return the state of a job as the cluster names it: the first word of what it says."""
    return (str(job.state).split() or [""])[0].upper()
